"""Every fused loss is the dense one, in value and in all gradients, however it is cut."""

import pytest
import torch
from moekit.distill.fused import TeacherStates

from .head_samples import OBJECTIVES, Sample

HEADS = {
    "plain": {"has_bias": False},
    "bias": {},
    "scaled": {"scale": 0.3},
    "capped": {"softcap": 2.0, "scale": 1.5},
}


def assert_equal_losses(sample, ours, dense, tolerance):
    torch.testing.assert_close(ours, dense, rtol=tolerance, atol=tolerance)
    for found, expected in zip(sample.gradients(ours), sample.gradients(dense), strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("head", HEADS)
def test_in_double_precision_and_any_cut(name, head):
    objective, loss = OBJECTIVES[name]
    sample = Sample(**HEADS[head])
    dense = sample.dense(loss)
    for tile_elements in (None, 1, 23, 40):
        assert_equal_losses(sample, sample.fused(objective, tile_elements=tile_elements), dense, 1e-10)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("head", ["bias", "capped"])
def test_in_single_precision(name, head):
    objective, loss = OBJECTIVES[name]
    sample = Sample(torch.float32, **HEADS[head])
    assert_equal_losses(sample, sample.fused(objective, tile_elements=23), sample.dense(loss), 1e-5)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "cross-entropy"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_teacher_by_logits_is_the_one_by_states(name, softcap):
    objective, _ = OBJECTIVES[name]
    sample = Sample(softcap=softcap)
    logits = sample.teacher_logits()
    before = logits.clone()
    by_logits = sample.fused(objective, teacher=logits, tile_elements=30)
    assert_equal_losses(sample, by_logits, sample.fused(objective), 1e-10)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(name, softcap):
    objective, _ = OBJECTIVES[name]
    sample = Sample(softcap=softcap, num_rows=3)

    def loss(*leaves):
        sample.hidden, sample.weight, sample.bias = leaves
        return sample.fused(objective, tile_elements=20)

    assert torch.autograd.gradcheck(loss, sample.leaves, fast_mode=True)


@pytest.mark.parametrize(
    "name", ["kl", "reverse-kl", "skewed-kl", "jsd", "binary-none-sum", "binary-mean-sum"]
)
def test_the_teacher_itself_as_student_has_no_loss(name):
    objective, _ = OBJECTIVES[name]
    sample = Sample(has_bias=False)
    teacher = TeacherStates(sample.hidden.detach(), sample.head)
    loss = sample.fused(objective, teacher=teacher)
    assert abs(loss.item()) < 1e-14
    for gradient in sample.gradients(loss):
        assert gradient.abs().max() < 1e-14


def test_padded_columns_get_no_gradient():
    sample = Sample()
    for objective, _ in OBJECTIVES.values():
        _, by_weight, by_bias = sample.gradients(sample.fused(objective))
        assert not by_weight[11:].any()
        assert not by_bias[11:].any()


@pytest.mark.parametrize(
    "name", ["kl", "jsd", "skewed-kl", "skewed-reverse-kl", "reverse-kl", "binary-none-sum"]
)
def test_extreme_logits_stay_finite(name):
    objective, loss = OBJECTIVES[name]
    sample = Sample(torch.float32, scale=3000.0)
    ours, dense = sample.fused(objective), sample.dense(loss)
    assert ours.isfinite()
    torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-4)
    assert all(gradient.isfinite().all() for gradient in sample.gradients(ours))
