import pytest
import torch
from moekit.moe import UnsupportedModelError
from moekit.moe.dropout.build import smoe_layers
from moekit.moe.dropout.center import center_routers
from moekit.moe.dropout.convert import set_active_experts, to_smoe_dropout
from moekit.moe.dropout.observe import observe_routers

from .small_models import VOCAB, gpt2, smoe, token_ids


def skewed_model(layers=1):
    """Each FFN reads normalised features plus 1: a mean of one standard deviation."""
    dense = gpt2(width=256, layers=layers, vocab_size=2000)
    for block in dense.transformer.h:
        block.ln_2.bias.data.fill_(1.0)
    return to_smoe_dropout(dense, 16, "uniform", active_experts=1).eval()


def batches(count=6, vocab_size=VOCAB):
    return [{"input_ids": token_ids(16, 32, seed, vocab_size)} for seed in range(count)]


def test_a_mean_of_one_deviation_is_balanced():
    model = skewed_model()
    data = batches(8, vocab_size=2000)
    (load,) = center_routers(model, data).values()
    assert load.before.max_load > 3
    assert load.before.min_load == 0
    assert load.after.max_load < 1.4
    assert load.after.min_load > 0.6
    for name, load in center_routers(model, data).items():
        assert load.before == load.after, name


def test_the_bias_takes_the_mean_out_of_every_layer():
    """With equal weights and K = E no choice changes, so one pass is exact for all layers."""
    model = skewed_model(layers=3).double()
    set_active_experts(model, 16)
    center_routers(model, batches(2))
    sums = dict.fromkeys(smoe_layers(model), 0.0)

    def add(routed):
        sums[routed.layer] += routed.router_logits.sum(0)

    with torch.no_grad(), observe_routers(model, add):
        for batch in batches(2):
            model(**batch)
    assert len(sums) == 3
    for total in sums.values():
        assert (total / 1024).abs().max() < 1e-12


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side):
    ids = token_ids(2, 6)
    padding = torch.full((2, 3), 7)
    mask = torch.ones_like(ids), torch.zeros_like(padding)
    parts = (ids, padding) if side == "right" else (padding, ids)
    masks = mask if side == "right" else mask[::-1]
    positions = torch.cat([torch.arange(6), torch.zeros(3, dtype=torch.long)])
    positions = positions if side == "right" else positions.roll(3)
    plain, padded = smoe("random", 1).double(), smoe("random", 1).double()
    loads = center_routers(plain, [{"input_ids": ids}])
    padded_batch = {
        "input_ids": torch.cat(parts, 1),
        "attention_mask": torch.cat(masks, 1),
        "position_ids": positions.expand(2, -1),
    }
    assert center_routers(padded, [padded_batch]) == loads
    for one, other in zip(smoe_layers(plain).values(), smoe_layers(padded).values(), strict=True):
        torch.testing.assert_close(one.router.bias, other.router.bias)
        assert one.router.bias.abs().max() > 1e-3


def test_the_mode_is_kept_and_dropout_is_off():
    model = smoe("random", 1, gpt2(dropout=0.5)).train()
    twin = smoe("random", 1, gpt2(dropout=0.5)).eval()
    assert center_routers(model, batches(1)) == center_routers(twin, batches(1))
    assert model.training
    assert not twin.training


@pytest.mark.parametrize("router", ["learned", "hash", "thor"])
def test_other_routers_are_refused(router):
    with pytest.raises(ValueError, match=f"router='{router}'; only frozen random ones are centred"):
        center_routers(smoe(router), batches(1))


def test_batches_that_cannot_serve_are_refused_and_change_nothing():
    model = smoe("random")
    ids = token_ids()
    for wrong, message in (
        (iter(batches(1)), r"pass list\(batches\)"),
        ([], "no token"),
        ([{"input_ids": ids, "attention_mask": torch.zeros_like(ids)}], "no token"),
    ):
        with pytest.raises(ValueError, match=message):
            center_routers(model, wrong)
    assert not any(layer.router.bias.any() for layer in smoe_layers(model).values())
    with pytest.raises(UnsupportedModelError, match="no SMoE-Dropout layers"):
        center_routers(gpt2(), batches(1))
