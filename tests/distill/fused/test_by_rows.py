"""Dense losses a few rows at a time: teachers of other columns, of their likeliest tokens, and memory."""

import pytest
import torch
from moekit.distill import fused, losses
from moekit.distill.losses import LOSSES

from ..largest import Largest
from .head_samples import Sample, dense_logits


def assert_equal(sample, ours, dense):
    torch.testing.assert_close(ours, dense, rtol=1e-10, atol=1e-10)
    for found, expected in zip(sample.gradients(ours), sample.gradients(dense), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("width", [6, 17])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_teacher_of_other_columns(width, softcap):
    sample = Sample(softcap=softcap, scale=1.5)
    head = fused.Head(weight=torch.randn(width, 3, dtype=torch.float64), softcap=softcap)
    states = fused.TeacherStates(sample.teacher.hidden, head)
    logits = dense_logits(states.hidden, head)
    dense = losses.uld(dense_logits(sample.hidden, sample.head), logits).mean()
    objective = fused.by_rows(losses.uld, compares_columns=False)
    for teacher in (states, logits):
        for tile_elements in (None, 1, 40):
            found = sample.fused(objective, teacher=teacher, tile_elements=tile_elements)
            assert_equal(sample, found, dense)


@pytest.mark.parametrize("label_weight", [0.0, 0.5])
def test_a_teacher_by_its_likeliest_tokens(label_weight):
    sample = Sample()
    teacher = fused.TopK(*sample.teacher_logits().log_softmax(-1).topk(4))
    logits = dense_logits(sample.hidden, sample.head)
    dense = losses.cached_top_k_kl(logits, teacher.log_probs, teacher.ids).mean()
    objective = fused.by_rows(losses.cached_top_k_kl, compares_columns=False, needs_ids=True)
    if label_weight:
        objective = fused.cross_entropy_plus(objective, 1.0, label_weight=label_weight)
        dense = dense + label_weight * torch.nn.functional.cross_entropy(logits, sample.labels)
    for tile_elements in (None, 23):
        assert_equal(sample, sample.fused(objective, teacher=teacher, tile_elements=tile_elements), dense)


def test_a_weight_that_is_used_elsewhere_too_gets_both_gradients():
    """As one that is tied to the embedding."""
    sample = Sample(has_bias=False)
    head, objective = fused.Head(weight=sample.weight, num_columns=11), fused.by_rows(losses.binary_kl)
    ours = fused.fused_loss(sample.weight[:7] * 2, head, objective, teacher=sample.teacher)
    dense = losses.binary_kl(dense_logits(sample.weight[:7] * 2, head), sample.teacher_logits()).mean()
    found, expected = (torch.autograd.grad(loss, sample.weight) for loss in (ours, dense))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LOSSES)
def test_no_tensor_is_larger_than_a_tile(name):
    """64 rows of 128 columns, 8 at a time."""
    method = LOSSES[name]
    objective = fused.by_rows(method.function, needs_labels=method.needs_labels)
    hidden, weight = torch.randn(64, 4, requires_grad=True), torch.randn(128, 4, requires_grad=True)
    teacher = fused.TeacherStates(torch.randn(64, 4), fused.Head(weight=torch.randn(128, 4)))
    labels = torch.randint(128, (64,)) if method.needs_labels else None
    head = fused.Head(weight=weight)
    with Largest() as seen:
        fused.fused_loss(
            hidden, head, objective, teacher=teacher, labels=labels, tile_elements=1024
        ).backward()
    assert seen.elements == 1024


def test_teachers_that_the_objective_cannot_take():
    sample = Sample()
    teacher = fused.TopK(*sample.teacher_logits().log_softmax(-1).topk(4))
    of_ids = fused.by_rows(losses.cached_top_k_kl, compares_columns=False, needs_ids=True)
    with pytest.raises(ValueError, match="got a TopK, but the objective takes logits or hidden states"):
        sample.fused(fused.kl(), teacher=teacher)
    with pytest.raises(ValueError, match="got a TeacherStates, but the objective takes its likeliest tokens"):
        sample.fused(of_ids)
    with pytest.raises(ValueError, match=r"shape \(6, 17\) and the student's \(7, 11\)"):
        sample.fused(fused.by_rows(losses.uld, compares_columns=False), teacher=torch.zeros(6, 17).double())
    with pytest.raises(ValueError, match=r"shape \(7, 17\) and the student's \(7, 11\)"):
        sample.fused(fused.by_rows(losses.binary_kl), teacher=torch.zeros(7, 17).double())
