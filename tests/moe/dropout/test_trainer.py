import copy

import pytest
import torch
import transformers
from moekit.moe.dropout.balance import load_balance_loss
from moekit.moe.dropout.build import smoe_layers
from moekit.moe.dropout.load import LoadMeter
from moekit.moe.dropout.thor import ThorRouter, thor_loss
from moekit.moe.trainer import MoETrainer
from peft import LoraConfig, get_peft_model

from .small_models import VOCAB, llama, losses, smoe, token_ids, trainer

KINDS = ["random", "learned", "hash", "thor"]
OPTIMIZERS = [
    {"optim": "adamw_torch", "weight_decay": 0.5},
    {"optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 0.5},
]


def buffers(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers() if ".router." in name}


def batch(rows=4, seed=5):
    """Rows of different numbers of labels, padded on the right."""
    ids = token_ids(rows, 8, seed=seed)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, 8 - 2 * (row % 4) :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def rows_of(inputs):
    return [dict(zip(inputs, row, strict=True)) for row in zip(*inputs.values(), strict=True)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["adamw", "sgd"])
@pytest.mark.parametrize("router", ["random", "hash", "thor"])
def test_frozen_routers_never_move(router, optimizer, tmp_path):
    model = smoe(router)
    routers, weights = buffers(model), copy.deepcopy(dict(model.named_parameters()))
    trainer(model, tmp_path, **optimizer).train()
    assert routers
    assert all(torch.equal(buffer, routers[name]) for name, buffer in buffers(model).items())
    assert all(not torch.equal(weight, weights[name]) for name, weight in model.named_parameters())


@pytest.mark.parametrize("router", ["random", "hash"])
def test_frozen_routers_never_move_under_adapters(router, tmp_path):
    model = smoe(router)
    routers = buffers(model)
    experts = [name for name, _ in model.named_parameters() if name.endswith("down_proj")]
    config = LoraConfig(target_modules="all-linear", target_parameters=experts, r=2)
    adapted = get_peft_model(model, config)
    trainer(adapted, tmp_path, weight_decay=0.5).train()
    merged = adapted.merge_and_unload()
    assert all(torch.equal(buffer, routers[name]) for name, buffer in buffers(merged).items())
    assert routers


def test_learned_routers_move(tmp_path):
    model = smoe("learned")
    before = [layer.router.weight.detach().clone() for layer in smoe_layers(model).values()]
    trainer(model, tmp_path).train()
    for layer, weight in zip(smoe_layers(model).values(), before, strict=True):
        assert not torch.equal(layer.router.weight, weight)


@pytest.mark.parametrize("router", ["random", "hash"])
def test_other_models_have_the_plain_loss(router, tmp_path):
    runs = [trainer(smoe(router), tmp_path), trainer(smoe(router), tmp_path, maker=MoETrainer)]
    for run in runs:
        run.train()
    assert losses(runs[0]) == losses(runs[1])
    dense = trainer(llama(), tmp_path)
    dense.train()
    assert len(losses(dense)) == 3


@pytest.mark.parametrize("router", KINDS)
def test_evaluation_has_the_plain_loss(router, tmp_path):
    run = trainer(smoe(router), tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    run.train()
    with torch.no_grad():
        ids = torch.stack([row["input_ids"] for row in run.eval_dataset])
        expected = run.model.eval()(input_ids=ids, labels=ids).loss
    assert run.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-6)


def alternate(monkeypatch):
    """THOR's first forward takes expert 0, its second expert 1, and so on."""
    calls = {}

    def scores(router, hidden):
        calls[router] = calls.get(router, -1) + 1
        first = torch.arange(8) == calls[router] % 2
        return first.float().expand(len(hidden), -1)

    monkeypatch.setattr(ThorRouter, "_scores", scores)


@pytest.mark.parametrize("router", KINDS)
def test_accumulated_parts_make_the_step_of_the_whole_batch(router, tmp_path, monkeypatch):
    alternate(monkeypatch)
    parameters = []
    k = 1 if router == "thor" else 2
    for size in (8, 2):
        model = smoe(router, k)
        run = trainer(
            model, tmp_path, options={"load_balance": 0.0},
            per_device_train_batch_size=size, gradient_accumulation_steps=8 // size,
            max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=0.0,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        run.train_dataset = rows_of(batch(8))
        run.train()
        parameters.append((losses(run), dict(model.named_parameters())))
    (whole_loss, whole), (parts_loss, parts) = parameters
    assert whole_loss == pytest.approx(parts_loss, abs=2e-4)  # the logs are rounded
    fresh = dict(smoe(router, k).named_parameters())
    for name, weight in whole.items():
        torch.testing.assert_close(weight, parts[name], rtol=1e-4, atol=1e-6)
        assert "experts" in name or not torch.equal(weight, fresh[name])


def test_thor_has_the_loss_of_two_forwards(tmp_path):
    model = smoe("thor", 1).train()
    run = trainer(model, tmp_path, options={"consistency": 3.0})
    inputs = batch()
    torch.manual_seed(1)
    computed = run.compute_loss(model, inputs)
    assert set(inputs) == {"input_ids", "attention_mask", "labels"}
    torch.manual_seed(1)
    logits = [model(**inputs).logits[:, :-1].flatten(0, 1) for _ in range(2)]
    expected = thor_loss(*logits, inputs["labels"][:, 1:].flatten(), alpha=3.0)
    torch.testing.assert_close(computed, expected)
    assert not torch.equal(*logits)


def test_thor_trains_classifiers_and_with_smoothed_labels(tmp_path):
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=3,
    )
    model = smoe("thor", 1, transformers.BertForSequenceClassification(config)).train()
    run = trainer(model, tmp_path)
    inputs = {"input_ids": token_ids(4), "labels": torch.tensor([0, 1, 2, 0])}
    torch.manual_seed(1)
    computed = run.compute_loss(model, inputs)
    torch.manual_seed(1)
    logits = [model(**inputs).logits for _ in range(2)]
    torch.testing.assert_close(computed, thor_loss(*logits, inputs["labels"]))
    smoothed = trainer(smoe("thor", 1), tmp_path, label_smoothing_factor=0.1)
    smoothed.train()
    assert len(losses(smoothed)) == 3


def test_learned_routers_get_the_mean_balance_of_their_layers_without_padding(tmp_path):
    model = smoe("learned").train()
    inputs = batch()
    plain = trainer(model, tmp_path, options={"load_balance": 0.0}).compute_loss(model, inputs)
    computed = trainer(model, tmp_path, options={"load_balance": 0.5}).compute_loss(model, inputs)
    outputs = []
    for layer in smoe_layers(model).values():
        layer.router.register_forward_hook(lambda module, args, output: outputs.append(output))
    model(**inputs)
    counted = inputs["attention_mask"].flatten().bool()
    terms = [load_balance_loss(logits[counted], ids[counted]) for logits, _, ids in outputs]
    torch.testing.assert_close(computed, plain + 0.5 * (terms[0] + terms[1]) / 2)


def test_the_balance_of_accumulated_parts_is_their_mean(tmp_path):
    model = smoe("learned").train()
    runs = [trainer(model, tmp_path, options={"load_balance": factor}) for factor in (0.0, 0.5)]
    inputs = batch()
    for run in runs:
        run.current_gradient_accumulation_steps = 4
    plain, computed = (run.compute_loss(model, inputs, num_items_in_batch=torch.tensor(50)) for run in runs)
    unscaled = [run.compute_loss(model, inputs) for run in runs]
    torch.testing.assert_close(computed - plain, (unscaled[1] - unscaled[0]) / 4)


def test_the_balance_goes_through_gradient_checkpointing_or_is_refused(tmp_path):
    gradients = []
    for options in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model = smoe("learned").train()
        if options:
            model.activation_checkpointing_enable(options)
            model.enable_input_require_grads()
        run = trainer(model, tmp_path, options={"load_balance": 10.0})
        if options == {"use_reentrant": True}:
            with pytest.raises(ValueError, match="gets no gradient from load_balance"):
                run.compute_loss(model, batch())
            continue
        run.compute_loss(model, batch()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
def test_the_balance_loss_balances(tmp_path):
    loads = []
    for factor in (0.0, 1.0):
        model = smoe("learned", 1)
        run = trainer(model, tmp_path, options={"load_balance": factor}, max_steps=30)
        run.train()
        with LoadMeter(model) as meter:
            model(input_ids=token_ids(24))
        loads.append(max(int(counts_E.max()) for counts_E in meter.read_and_reset().values()))
    assert loads[1] < 0.8 * loads[0]


@pytest.mark.parametrize("router", KINDS)
def test_a_resumed_run_equals_an_uninterrupted_one(router, tmp_path):
    whole = trainer(smoe(router), tmp_path, max_steps=4)
    whole.args.save_strategy, whole.args.save_steps = transformers.trainer_utils.SaveStrategy.STEPS, 2
    whole.state.save_steps = 2
    whole.train()
    resumed = trainer(smoe(router), tmp_path, max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    expected = whole.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.model.state_dict().items())


@pytest.mark.parametrize("name", ["load_balance", "consistency"])
@pytest.mark.parametrize("factor", [-1.0, float("nan"), float("inf")])
def test_a_factor_that_cannot_be_is_refused(name, factor, tmp_path):
    with pytest.raises(ValueError, match=f"{name}={factor} is not a finite number of at least 0"):
        trainer(smoe("thor"), tmp_path, options={name: factor})
