"""Gradient alignment against PCGrad as it is released, written with copies."""

import pytest
import torch
from moekit.distill import (
    AuxiliaryHeadSpec,
    DualHeadStudent,
    GradientAlignment,
    alignment_factor,
    feature_products,
    parameter_products,
)

from .students import inputs_for, student_model


def test_values_worked_by_hand():
    dot, squared_norm = torch.tensor(-3.0), torch.tensor(6.0)
    assert alignment_factor(dot, squared_norm) == 1.5
    assert alignment_factor(-dot, squared_norm) == 1
    assert alignment_factor(torch.tensor(0.0), torch.tensor(0.0)) == 1
    g0, g1 = torch.tensor([1.0, 2, -1]), torch.tensor([-2.0, 0, 1])
    assert torch.equal(1.5 * g0 + g1, torch.tensor([-0.5, 3, -0.5]))


def one_sided_pcgrad(g0, g1):
    """As released: project, then add."""
    dot = g0.dot(g1)
    if dot < 0:
        g1 = g1 - dot / g0.dot(g0) * g0
    return g0 + g1


def losses(student, sign):
    both = student(**inputs_for(student.model))
    labels = torch.tensor([0, 1, 2])
    task = torch.nn.functional.cross_entropy(both.logits, labels)
    return task, sign * torch.nn.functional.cross_entropy(both.auxiliary_logits, labels), both.features


def flat_gradient(loss, parameters):
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.cat(
        [torch.zeros(p.numel()) if g is None else g.flatten() for g, p in zip(found, parameters, strict=True)]
    )


def copied_student():
    return DualHeadStudent(student_model("bert-sequence"), AuxiliaryHeadSpec(kind="copy"))


@pytest.mark.parametrize("where", ["all", "backbone"])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_factor_gives_pcgrads_gradient(where, sign):
    student = copied_student()
    whole = list(student.parameters())
    measured = whole if where == "all" else list(student.model.base_model.parameters())
    task, distilled, _ = losses(student, sign)
    factor = alignment_factor(*parameter_products(task, distilled, measured))
    assert (factor > 1) == (sign < 0)
    ours = flat_gradient(factor * task + distilled, measured)
    g0, g1 = (flat_gradient(loss, measured) for loss in (task, distilled))
    torch.testing.assert_close(ours, one_sided_pcgrad(g0, g1), rtol=1e-5, atol=1e-6)


def test_frozen_parameters_are_left_out():
    student = copied_student()
    for parameter in student.model.bert.embeddings.parameters():
        parameter.requires_grad = False
    task, distilled, _ = losses(student, -1)
    some = parameter_products(task, distilled, list(student.parameters()))
    rest = parameter_products(task, distilled, [p for p in student.parameters() if p.requires_grad])
    assert some == rest


def test_measured_at_the_features_and_added_up_over_parts_of_a_batch():
    """Which is what several processes, or micro-batches, do."""
    torch.manual_seed(0)
    features = torch.randn(6, 8, requires_grad=True)
    heads = torch.randn(2, 8, 4)
    labels = torch.arange(6) % 4

    def products(rows):
        part = features[rows]
        task, distilled = (
            sign * torch.nn.functional.cross_entropy(part @ head, labels[rows], reduction="sum") / 6
            for head, sign in zip(heads, (1, -1), strict=True)
        )
        return torch.stack(feature_products(task, distilled, part))

    whole = products(slice(0, 6))
    torch.testing.assert_close(products(slice(0, 2)) + products(slice(2, 6)), whole)
    task = torch.nn.functional.cross_entropy(features @ heads[0], labels)
    (g0,) = torch.autograd.grad(task, features)
    torch.testing.assert_close(whole[1], g0.square().sum())


def test_a_loss_that_reaches_nothing_has_no_say():
    features = torch.randn(3, 4, requires_grad=True)
    other = torch.randn(3, 4, requires_grad=True)
    dot, squared_norm = feature_products(features.sum(), other.sum(), features)
    assert dot == 0
    assert squared_norm == 12
    dot, squared_norm = feature_products(other.sum(), features.sum(), features)
    assert alignment_factor(dot, squared_norm) == 1


def test_the_running_factor_is_smoothed_and_restored():
    alignment = GradientAlignment(every_n_steps=3, smoothing=0.75)
    due = []
    for step in range(5):
        alignment.begin_step(step, num_parts=1)
        due.append(alignment.is_measuring)
    assert due == [True, False, False, True, False]
    six = torch.tensor(6.0)
    assert alignment.update(torch.tensor(-6.0), six) == 2  # the first counts in full
    assert alignment.update(torch.tensor(-12.0), six) == 2.25
    again = GradientAlignment(every_n_steps=3, smoothing=0.75)
    again.load_state_dict(alignment.state_dict())
    assert torch.equal(again.update(torch.tensor(0.0), six), alignment.update(torch.tensor(0.0), six))


@pytest.mark.parametrize("bad", [{"every_n_steps": 0}, {"every_n_steps": -1}, {"smoothing": 1.0}])
def test_bad_settings_are_refused(bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        GradientAlignment(**bad)
