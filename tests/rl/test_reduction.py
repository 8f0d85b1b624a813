"""Token losses to one number."""

import pytest
import torch
from moekit.rl.reduction import Counts, count, reduce_loss

VALUES = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, False], [False, True, False], [False, False, False]])
COUNTED = torch.tensor([True, True, True])
BY_HAND = {
    "token-mean": (1 + 2 + 5) / 3,
    "sequence-mean": ((1 + 2) / 2 + 5 + 0) / 3,
    "fixed-length": (1 + 2 + 5) / (3 * 10),
    "token-sum": (1 + 2 + 5) / 10,
}


@pytest.mark.parametrize("reduction", BY_HAND)
def test_by_hand(reduction):
    found = reduce_loss(VALUES, MASK, reduction, count(MASK, COUNTED, 10))
    assert float(found) == pytest.approx(BY_HAND[reduction])


def test_counts():
    found = count(MASK, torch.tensor([True, False, True]), 10)
    assert (float(found.tokens), float(found.sequences), found.max_length) == (3.0, 2.0, 10)


@pytest.mark.parametrize("reduction", BY_HAND)
@pytest.mark.parametrize("parts", [[[0], [1], [2]], [[2, 0], [1]], [[1, 2], [0]]])
def test_parts_add_up_to_the_whole(reduction, parts):
    counts = [count(MASK[rows], COUNTED[rows], 10) for rows in parts]
    total = Counts(
        tokens=torch.stack([c.tokens for c in counts]).sum(),
        sequences=torch.stack([c.sequences for c in counts]).sum(),
        max_length=10,
    )
    found = sum(reduce_loss(VALUES[rows], MASK[rows], reduction, total) for rows in parts)
    assert float(found) == pytest.approx(BY_HAND[reduction])


@pytest.mark.parametrize("reduction", BY_HAND)
def test_what_is_masked_is_not_read_and_has_no_gradient(reduction):
    values = torch.where(MASK, VALUES, torch.inf).requires_grad_()
    loss = reduce_loss(values, MASK, reduction, count(MASK, COUNTED, 10))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(BY_HAND[reduction])
    assert (values.grad[~MASK] == 0).all()
    assert (values.grad[MASK] > 0).all()


@pytest.mark.parametrize("reduction", BY_HAND)
def test_nothing_to_count_is_0(reduction):
    empty = torch.zeros_like(MASK)
    assert float(reduce_loss(VALUES, empty, reduction, count(empty, ~COUNTED, 10))) == 0


def test_an_unknown_reduction_is_refused():
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match="reduction='mean' is not token-mean"):
            reduce_loss(VALUES, MASK, "mean", count(MASK, COUNTED, 10))
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
