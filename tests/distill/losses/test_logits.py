"""Softcap and padded columns."""

import math

import pytest
import torch
from moekit.distill.losses import drop_padded_columns, kl, softcap

from .calls import logits


def test_softcap_by_hand():
    capped = softcap(torch.tensor([[0.0, 30.0, -60.0, 1e6]], dtype=torch.float64), 30.0)
    assert capped.tolist()[0] == pytest.approx([0, 30 * math.tanh(1), -30 * math.tanh(2), 30])


def test_softcap_keeps_order_shape_and_precision_and_none_changes_nothing():
    values = torch.randn(2, 3, 7).bfloat16()
    capped = softcap(values, 5.0)
    assert capped.shape == values.shape
    assert capped.dtype == torch.bfloat16
    assert torch.equal(softcap(values, None), values)
    assert torch.autograd.gradcheck(lambda z: softcap(z, 3.0), (logits(0).requires_grad_(),))


@pytest.mark.parametrize("cap", [0.0, -1.0, float("inf"), float("nan")])
def test_cap_that_is_none_is_refused(cap):
    with pytest.raises(ValueError, match=f"cap={cap} is not a finite number above 0"):
        softcap(logits(0), cap)


def test_padded_columns_do_not_count_once_dropped():
    student, teacher = logits(0, classes=16), logits(1)
    student[:, 11:] = 50.0
    student.requires_grad_()
    loss = kl(drop_padded_columns(student, 11), drop_padded_columns(teacher, 11))
    loss.sum().backward()
    torch.testing.assert_close(loss, kl(student.detach()[:, :11].contiguous(), teacher))
    assert torch.equal(student.grad[:, 11:], torch.zeros(5, 5, dtype=torch.float64))


@pytest.mark.parametrize("size", [0, 12])
def test_vocabulary_larger_than_the_logits_is_refused(size):
    with pytest.raises(ValueError, match=f"vocab_size={size} is not between 1 and the 11 columns"):
        drop_padded_columns(logits(0), size)
