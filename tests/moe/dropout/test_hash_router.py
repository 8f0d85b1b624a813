import copy

import pytest
import torch
import transformers
from moekit.moe import expert_layers, save_checkpoint
from moekit.moe.dropout.build import smoe_layers
from moekit.moe.dropout.convert import to_smoe_dropout
from moekit.moe.dropout.hash_router import HashRouter, hash_table

from .small_models import VOCAB, gpt2, llama, smoe, token_ids


def routed_ids(model, **inputs):
    """What every layer chose in one forward."""
    chosen = []
    hooks = [
        layer.router.register_forward_hook(lambda module, args, output: chosen.append(output[2]))
        for layer in smoe_layers(model).values()
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return chosen


@pytest.mark.parametrize("vocab_size", [1, 5, 64, 1003])
@pytest.mark.parametrize("num_experts", [2, 3, 16])
def test_rows_are_permutations_and_columns_are_balanced(vocab_size, num_experts):
    table = hash_table(vocab_size, num_experts, torch.Generator().manual_seed(0)).long()
    assert table.shape == (vocab_size, num_experts)
    assert torch.equal(table.sort(1).values, torch.arange(num_experts).expand(vocab_size, -1))
    for column in table.T:
        counts = torch.bincount(column, minlength=num_experts)
        assert counts.max() - counts.min() <= 1


def test_pairs_of_experts_are_as_frequent_as_by_chance():
    """The second choice does not follow from the first."""
    table = hash_table(56_000, 8, torch.Generator().manual_seed(0)).long()
    pairs = torch.bincount(table[:, 0] * 8 + table[:, 1], minlength=64).view(8, 8)
    off_diagonal = pairs[~torch.eye(8, dtype=torch.bool)].double()
    assert not pairs.diagonal().any()
    assert (off_diagonal / 1000 - 1).abs().max() < 0.15


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("dense", [llama, gpt2])
def test_a_token_has_the_experts_of_its_id_wherever_it_stands(dense, k):
    model = smoe("hash", k, dense()).eval()
    ids = token_ids()
    tables = [layer.router.table for layer in smoe_layers(model).values()]
    for chosen, table in zip(routed_ids(model, input_ids=ids), tables, strict=True):
        assert torch.equal(chosen, table[ids.flatten(), :k].long())
    assert not torch.equal(tables[0], tables[1])


def test_many_experts_fit_into_the_table():
    router = HashRouter(300, VOCAB, like=torch.empty(1))
    router.draw(torch.Generator().manual_seed(0))
    assert torch.equal(router.table.sort(1).values, torch.arange(300, dtype=torch.int32).expand(VOCAB, -1))


def test_the_logits_rank_the_experts_and_the_weights_are_equal():
    router = HashRouter(8, VOCAB, scale=3.0, like=torch.empty(1))
    router.draw(torch.Generator().manual_seed(0))
    router.top_k = 3
    router.token_ids = token_ids(1, 5)
    router.is_running = True
    logits, weights, ids = router(torch.randn(5, 4))
    assert torch.equal(logits.topk(3).indices, ids)
    assert torch.equal(weights, torch.ones(5, 3))
    assert not list(router.parameters())


@pytest.mark.parametrize("dense", [llama, gpt2])
def test_generation_with_and_without_cache_is_the_same(dense):
    model = smoe("hash", 2, dense()).eval()
    ids = token_ids(2)
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "attention_mask": torch.ones_like(ids),
        "pad_token_id": 0,
    }
    cached = model.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    assert cached.shape[1] > ids.shape[1]


def test_the_decoder_behind_an_encoder_routes_by_its_own_ids():
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=16,
        d_ff=32,
        d_kv=8,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    model = smoe("hash", 1, transformers.T5ForConditionalGeneration(config)).eval()
    ids, decoder_ids = token_ids(2, 8), token_ids(2, 5, seed=6)
    chosen = routed_ids(model, input_ids=ids, decoder_input_ids=decoder_ids)
    routers = [layer.router for layer in smoe_layers(model).values()]
    for router, own, experts in zip(routers, (ids, decoder_ids), chosen, strict=True):
        assert torch.equal(experts, router.table[own.flatten(), :1].long())


def test_a_base_model_and_a_copy_know_their_ids():
    model = smoe("hash").eval()
    twin = copy.deepcopy(model)
    ids = token_ids()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert torch.equal(twin(input_ids=ids).logits, expected)
        assert torch.equal(twin.lm_head(twin.model(ids).last_hidden_state), expected)
    assert next(iter(smoe_layers(twin).values())).router.token_ids is ids


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    model = smoe("hash").train()
    ids = token_ids()
    plain, checkpointed = copy.deepcopy(model), model
    checkpointed.activation_checkpointing_enable({"use_reentrant": reentrant})
    for each in (plain, checkpointed):
        each.enable_input_require_grads()
        each(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for one, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert one.grad is not None
        torch.testing.assert_close(one.grad, other.grad)


def test_two_forwards_before_one_backward_do_not_go_with_gradient_checkpointing():
    model = smoe("hash").train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    one, other = token_ids(), token_ids(seed=6)
    loss = model(input_ids=one, labels=one).loss + model(input_ids=other, labels=other).loss
    with pytest.raises(ValueError, match="repeats a forward whose token ids are gone"):
        loss.backward()


def test_inputs_without_ids_are_refused():
    model = smoe("hash").eval()
    embeddings = model.get_input_embeddings()(token_ids())
    with pytest.raises(ValueError, match="LlamaModel has hash routers, which need input_ids"):
        model(inputs_embeds=embeddings)
    layer = next(iter(smoe_layers(smoe("hash")).values()))
    with pytest.raises(ValueError, match="call the model with input_ids, not this layer"):
        layer(embeddings)
    model(input_ids=token_ids())
    with pytest.raises(ValueError, match="got 8 tokens where input_ids has 24"):
        next(iter(smoe_layers(model).values()))(embeddings[:1])


def test_what_cannot_have_hash_routers_is_refused_and_left_as_it_was():
    vision = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
    )
    with pytest.raises(ValueError, match="the config of 'vit' has no vocab_size"):
        smoe("hash", 2, vision)
    assert not smoe_layers(vision)
    dense = llama()
    for router in ("hash", "thor"):
        with pytest.raises(
            ValueError, match=f"'residual' needs probabilities, which router='{router}' does not"
        ):
            to_smoe_dropout(dense, 8, "residual", router=router)
    assert not smoe_layers(dense)


def test_a_grown_vocabulary_is_refused():
    model = smoe("hash").eval()
    model.resize_token_embeddings(VOCAB + 4, mean_resizing=False)
    with pytest.raises(ValueError, match=f"grew to {VOCAB + 4} tokens, the hash table has {VOCAB}"):
        model(input_ids=token_ids())


@pytest.mark.parametrize("router", ["hash", "thor", "learned", "random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_loads_equal(router, dtype, tmp_path):
    model = smoe(router, 3, gpt2()).to(dtype).eval()
    save = save_checkpoint if dtype is torch.float32 else type(model).save_pretrained
    save(model, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    ids = token_ids()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    kinds = {layer.router.kind for layer in smoe_layers(loaded).values()}
    assert kinds == {router}
    assert [layer.top_k for layer in expert_layers(loaded)] == [3, 3]
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
