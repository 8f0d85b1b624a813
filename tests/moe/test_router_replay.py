"""Router replay: recorded choices are chosen again, by every family that can; all others are refused."""

import copy
from contextlib import ExitStack, contextmanager

import pytest
import torch
from moekit.moe import UnsupportedModelError, expert_layers
from moekit.moe.router_replay import (
    RoutedExperts,
    check_replay,
    join_choices,
    record_choices,
    replay_choices,
)
from torch import Tensor

from .samples import fresh, merged, original_case
from .test_conformance import SUPPORTED

REFUSED = {
    # the router does not return (logits, weights, ids), or reads more than hidden states
    "afmoe",
    "dbrx",
    "deepseek_v4",
    "hy_v3",
    "jetmoe",
    "lfm2_moe",
    "llama4",
    "minimax_m2",
    "switch_transformers",
    "zaya",
    # a rule of its own
    "gemma4",
    "inkling",
    "longcat_flash",
    "phimoe",
}
MODELS = {
    "olmoe": lambda: fresh("olmoe"),
    "qwen3_moe": lambda: fresh("qwen3_moe"),
    "mixtral": lambda: fresh("mixtral"),
    "deepseek_v3": lambda: fresh("deepseek_v3"),
    "merged": lambda: merged("qwen3_moe"),
    "merged-logsumexp": lambda: merged("mixtral", router="logsumexp"),
}


def inputs_of(lengths: list[tuple[int, int]]) -> dict[str, Tensor]:
    """Prompts padded on the left, completions padded on the right; the tokens depend on the row alone."""
    longest = [max(column) for column in zip(*lengths, strict=True)]
    ids, mask = torch.zeros(len(lengths), sum(longest), dtype=torch.long), []
    for row, (prompt, completion) in enumerate(lengths):
        generator = torch.Generator().manual_seed(100 * prompt + completion)
        start = longest[0] - prompt
        ids[row, start : start + prompt + completion] = torch.randint(
            3, 64, (prompt + completion,), generator=generator
        )
        mask.append([0] * start + [1] * (prompt + completion) + [0] * (longest[1] - completion))
    mask = torch.tensor(mask)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


INPUTS = inputs_of([(4, 3), (2, 5), (3, 3)])


def recorded(model, inputs=INPUTS, layers=None) -> RoutedExperts:
    with torch.no_grad(), record_choices(model, layers) as choices:
        model(**inputs)
    return choices


def perturbed(model):
    """Another router, which chooses other experts."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer in expert_layers(other):
            for weight in layer.router.parameters():
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
    return other


def foreign(model) -> RoutedExperts:
    choices = recorded(perturbed(model))
    own = recorded(model)
    assert any((choices.choices[name] != ids).any() for name, ids in own.choices.items())
    return choices


@contextmanager
def heard(layers):
    """What routers read and what comes out of them; entered after a replay, what that makes of it."""
    outputs = []
    with ExitStack() as stack:
        for layer in layers:
            hook = layer.router.register_forward_hook(lambda m, args, out: outputs.append((args[0], out)))
            stack.callback(hook.remove)
        yield outputs


def reversed_choices(choices: RoutedExperts) -> RoutedExperts:
    flipped = {name: ids.flip(1) for name, ids in choices.choices.items()}
    return RoutedExperts(choices=flipped, lengths=choices.lengths)


def gradients(model, choices, inputs=INPUTS) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    with replay_choices(model, choices):
        loss = model(**inputs).logits[inputs["attention_mask"].bool()].logsumexp(-1).mean()
        loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_own_choices_change_nothing_to_the_last_bit(name):
    model = MODELS[name]()
    with torch.no_grad():
        expected = model(**INPUTS).logits
        with replay_choices(model, recorded(model)):
            replayed = model(**INPUTS).logits
        after = model(**INPUTS).logits
    assert torch.equal(replayed, expected)
    assert torch.equal(after, expected)


@pytest.mark.slow  # all of them together
@pytest.mark.parametrize("family", sorted(set(SUPPORTED) - REFUSED))
def test_the_rule_is_the_familys_own(family):
    """In the other order no choice agrees with the live one, so all weights come from the rule."""
    model, inputs, expected = original_case(family)
    layers = expert_layers(model)
    choices = recorded(model, inputs, layers)
    mask = inputs["attention_mask"].bool()
    weights = []
    for replay in (choices, reversed_choices(choices)):
        with torch.no_grad(), replay_choices(model, replay, layers), heard(layers) as outputs:
            logits = model(**inputs).logits
        torch.testing.assert_close(logits[mask], expected[mask], rtol=1e-3, atol=1e-4)
        weights.append([output[1] for _, output in outputs])
    for own, other in zip(*weights, strict=True):
        torch.testing.assert_close(other[mask.flatten()].flip(1), own[mask.flatten()], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_a_choice_that_cannot_be_replayed_is_refused(family):
    model, _, _ = original_case(family)
    with pytest.raises(UnsupportedModelError, match="cannot be replayed"):
        check_replay(expert_layers(model))


@pytest.mark.parametrize("name", MODELS)
def test_foreign_choices_are_weighed_by_the_live_router_which_learns(name):
    model = MODELS[name]()
    choices = foreign(model)
    layers = expert_layers(model)
    with replay_choices(model, choices), heard(layers) as outputs:
        logits = model(**INPUTS).logits
        logits[INPUTS["attention_mask"].bool()].logsumexp(-1).mean().backward()
    mask_T = INPUTS["attention_mask"].flatten().bool()
    for layer, (_, (_, weights, ids, *_)) in zip(layers, outputs, strict=True):
        assert torch.equal(ids[mask_T], choices.choices[layer.name].long())
        rule = layer.router_constraints
        if rule.renormalises:
            torch.testing.assert_close(weights.sum(1), torch.full_like(weights[:, 0], rule.scale))
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.router.parameters())


def test_weights_and_gradient_of_foreign_choices_equal_those_of_a_written_out_router():
    model = fresh("mixtral")
    choices = foreign(model)
    layer = expert_layers(model)[0]
    with replay_choices(model, choices), heard([layer]) as outputs:
        model(**INPUTS)
    hidden, (_, weights, _) = outputs[0]
    mask_T = INPUTS["attention_mask"].flatten().bool()
    router = layer.router.weight.detach().double().requires_grad_()
    scores = (hidden.detach().double()[mask_T] @ router.T).softmax(-1)
    chosen = torch.stack([s[i] for s, i in zip(scores, choices.choices[layer.name].long(), strict=True)])
    expected = chosen / chosen.sum(1, keepdim=True)
    pick = torch.randn(expected.shape)
    torch.testing.assert_close(weights[mask_T].double(), expected, rtol=1e-5, atol=1e-6)
    (own,) = torch.autograd.grad((weights[mask_T] * pick).sum(), layer.router.weight)
    (slow,) = torch.autograd.grad((expected * pick).sum(), router)
    torch.testing.assert_close(own, slow.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["deepseek_v3", "merged", "merged-logsumexp"])
def test_gradient_checkpointing_changes_nothing(name):
    model = MODELS[name]().train()
    choices = foreign(model)
    loss, grads = gradients(model, choices)
    model.activation_checkpointing_enable()
    again, repeated = gradients(model, choices)
    assert torch.equal(loss, again)
    assert grads.keys() == repeated.keys()
    for key, value in grads.items():
        assert torch.equal(value, repeated[key]), key


def test_a_backward_pass_after_the_replay_fails_under_gradient_checkpointing():
    model = fresh("olmoe").train()
    choices = foreign(model)
    model.activation_checkpointing_enable()
    with replay_choices(model, choices):
        loss = model(**INPUTS).logits.mean()
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        loss.backward()


def test_rows_are_found_again_in_micro_batches_of_other_padding():
    lengths = [(4, 3), (2, 5), (3, 1)]
    model = fresh("qwen3_moe")
    whole = recorded(model, inputs_of(lengths))
    assert whole.lengths.tolist() == [7, 7, 4]
    assert all(ids.dtype == torch.uint8 and ids.shape == (18, 2) for ids in whole.choices.values())
    other = perturbed(model)
    part = inputs_of([lengths[2], lengths[0]])
    with (
        torch.no_grad(),
        replay_choices(other, whole.select([2, 0])),
        pytest.raises(ValueError, match="already"),
    ):
        recorded(other, part)
    alone = join_choices([recorded(model, inputs_of([length])) for length in lengths])
    for name, ids in whole.choices.items():
        assert torch.equal(alone.choices[name], ids)
    chosen = whole.select(torch.tensor([2, 0]))
    seen = []
    layer = expert_layers(other)[0]
    with torch.no_grad(), replay_choices(other, chosen), layer.observe(lambda h, ids, w: seen.append(ids)):
        other(**part)
    mask_T = part["attention_mask"].flatten().bool()
    expected = torch.cat([whole.choices[layer.name][14:], whole.choices[layer.name][:7]])
    assert torch.equal(seen[0][mask_T], expected.long())
    assert len(chosen) == 2


def test_many_experts_take_wider_integers():
    model = fresh("olmoe")
    layer = expert_layers(model)[0]
    rows = layer.router.weight
    with torch.no_grad():
        layer.router.weight = torch.nn.Parameter(torch.cat([rows] * 33)[:257])
        layer.set_expert_map([expert % 8 for expert in range(257)])
    assert {ids.dtype for ids in recorded(model).choices.values()} == {torch.int16, torch.uint8}


def test_choices_are_logical_in_a_merged_model():
    model, twin = merged("qwen3_moe"), fresh("qwen3_moe")
    first = expert_layers(model)[0].name
    assert torch.equal(recorded(model).choices[first], recorded(twin).choices[first])
    assert recorded(twin).choices[first].max() >= 4


def test_padding_does_not_matter():
    model = fresh("olmoe")
    choices = recorded(model)
    padded = {name: torch.nn.functional.pad(value, (2, 3)) for name, value in INPUTS.items()}
    with torch.no_grad(), replay_choices(model, choices):
        logits = model(**padded).logits[:, 2:-3]
    expected = model(**INPUTS).logits
    mask = INPUTS["attention_mask"].bool()
    torch.testing.assert_close(logits[mask], expected[mask])


def test_a_second_forward_in_one_context_is_refused():
    model = fresh("olmoe")
    with torch.no_grad(), record_choices(model) as choices:
        model(**INPUTS)
        with pytest.raises(ValueError, match="called twice"):
            model(**INPUTS)
    with torch.no_grad(), replay_choices(model, choices):
        model(**INPUTS)
        with pytest.raises(ValueError, match="called twice"):
            model(**INPUTS)


def test_what_does_not_fit_is_refused():
    model = fresh("olmoe")
    choices = recorded(model)
    with torch.no_grad():
        with replay_choices(model, choices.select([1, 0])), pytest.raises(ValueError, match="same order"):
            model(**inputs_of([(4, 4), (2, 5)]))
        with replay_choices(model, choices), pytest.raises(ValueError, match="attention mask"):
            model(input_ids=INPUTS["input_ids"])
        with (
            pytest.raises(ValueError, match="recorded were the layers"),
            replay_choices(model, RoutedExperts()),
        ):
            pass
        for layer in expert_layers(model):
            layer.router.top_k = 3
        with replay_choices(model, choices), pytest.raises(ValueError, match="keep top_k"):
            model(**INPUTS)
    with pytest.raises(ValueError, match="nothing was recorded"), record_choices(fresh("olmoe")):
        pass
    with pytest.raises(ValueError, match="no recordings"):
        join_choices([])
    with pytest.raises(ValueError, match="do not go together"):
        join_choices([choices, RoutedExperts()])


def test_nothing_stays_behind():
    model = fresh("olmoe")
    before = [len(layer.router._forward_hooks) for layer in expert_layers(model)]
    choices = recorded(model)
    with pytest.raises(RuntimeError), replay_choices(model, choices):
        raise RuntimeError
    assert [len(layer.router._forward_hooks) for layer in expert_layers(model)] == before
    assert not model._forward_pre_hooks
