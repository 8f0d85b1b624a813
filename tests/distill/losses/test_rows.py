"""Shift, padding, prompts and ignored labels."""

import pytest
import torch
from moekit.distill.losses import kl, masked_mean, valid_rows

BATCH, LENGTH, VOCABULARY = 3, 6, 9

# A prompt of two tokens, padding on the right, padding on the left.
LABELS = torch.tensor([[-100, -100, 3, 4, 5, 6], [1, 2, 3, 4, -100, -100], [-100, -100, 7, 8, 1, 2]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]])
COUNTED = [
    (0, 1, 3),
    (0, 2, 4),
    (0, 3, 5),
    (0, 4, 6),
    (1, 0, 2),
    (1, 1, 3),
    (1, 2, 4),
    (2, 2, 8),
    (2, 3, 1),
    (2, 4, 2),
]


def batch_logits(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, LENGTH, VOCABULARY, generator=generator, dtype=torch.float64)


def batch_loss(student, teacher, labels=LABELS, mask=MASK):
    rows = valid_rows(labels, mask)
    return masked_mean(kl(rows.pack(student), rows.pack(teacher)))


def test_rows_that_count_are_those_of_the_loops():
    rows = valid_rows(LABELS, MASK)
    assert rows.positions.tolist() == [b * LENGTH + s for b, s, _ in COUNTED]
    assert rows.labels.tolist() == [label for _, _, label in COUNTED]
    assert len(rows) == len(COUNTED)
    states = batch_logits(0)
    packed = rows.pack(states)
    for row, (b, s, _) in enumerate(COUNTED):
        assert torch.equal(packed[row], states[b, s])


def test_label_of_a_row_is_the_token_after_it():
    ids = torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH)
    rows = valid_rows(ids)
    assert len(rows) == BATCH * (LENGTH - 1)
    assert torch.equal(rows.labels, rows.positions + 1)


def test_loss_is_that_of_shifted_cross_entropy():
    labels = LABELS.clone()
    states = batch_logits(0)
    rows = valid_rows(labels, MASK)
    ours = torch.nn.functional.cross_entropy(rows.pack(states), rows.labels)
    shifted = labels[:, 1:].clone()
    shifted[2, 1] = -100  # predicted from padding
    theirs = torch.nn.functional.cross_entropy(states[:, :-1].flatten(0, 1), shifted.flatten())
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_positions_that_do_not_count_change_nothing(side):
    counted = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    for b, s, _ in COUNTED:
        counted[b, s] = True
    student, teacher = batch_logits(0).requires_grad_(), batch_logits(1)
    plain = batch_loss(student, teacher)
    plain.backward()
    assert torch.equal(student.grad.abs().sum(-1) > 0, counted)
    noisy = [student.detach().clone(), teacher.clone()]
    noisy[side == "teacher"][~counted] = float("nan")
    assert torch.equal(batch_loss(*noisy), plain)


def test_each_position_that_counts_changes_something():
    student, teacher = batch_logits(0), batch_logits(1)
    plain = batch_loss(student, teacher)
    for b, s, _ in COUNTED:
        moved = student.clone()
        moved[b, s, 0] += 1
        assert batch_loss(moved, teacher) != plain


def test_padding_is_left_out_whatever_its_label():
    labels = torch.where(LABELS == -100, 1, LABELS)
    rows = valid_rows(labels, MASK)
    assert [position for position in rows.positions.tolist() if position >= LENGTH] == [
        b * LENGTH + s for b, s, _ in COUNTED if b > 0
    ]
    assert torch.equal(valid_rows(labels, MASK.bool()).positions, rows.positions)


def test_another_label_may_be_the_one_to_ignore():
    rows = valid_rows(torch.where(LABELS == -100, 0, LABELS), MASK, ignore_index=0)
    assert torch.equal(rows.positions, valid_rows(LABELS, MASK).positions)


def test_labels_are_not_changed():
    before = LABELS.clone(), MASK.clone()
    valid_rows(LABELS, MASK)
    assert torch.equal(LABELS, before[0])
    assert torch.equal(MASK, before[1])


@pytest.mark.parametrize("length", [1, LENGTH])
def test_batch_without_a_row_has_a_loss_of_zero_that_stays_in_the_graph(length):
    student = batch_logits(0)[:, :length].clone().requires_grad_()
    loss = batch_loss(student, batch_logits(1)[:, :length], torch.full((BATCH, length), -100), None)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_mean_over_more_rows_than_these():
    loss_N = torch.tensor([1.0, 2.0, 6.0])
    assert float(masked_mean(loss_N)) == 3
    assert float(masked_mean(loss_N, 9)) == 1
    assert float(masked_mean(loss_N, torch.tensor(9))) == 1
    assert float(masked_mean(loss_N[:0], 9)) == 0
    assert float(masked_mean(loss_N[:0], 0)) == 0
    assert float(masked_mean(loss_N[:0], torch.tensor(0))) == 0
    with pytest.raises(ValueError, match="num_items=-1"):
        masked_mean(loss_N, -1)


def test_accumulated_batches_weigh_every_row_alike():
    loss_N = torch.arange(7.0)
    parts = [masked_mean(part, 7) for part in (loss_N[:2], loss_N[2:])]
    torch.testing.assert_close(sum(parts), masked_mean(loss_N))


def test_states_of_another_batch_are_refused():
    rows = valid_rows(LABELS, MASK)
    with pytest.raises(ValueError, match=r"\(3, 5, 9\) for labels of shape \(3, 6\)"):
        rows.pack(batch_logits(0)[:, :-1])


@pytest.mark.usefixtures("shapes_unchecked")
def test_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"mask of shape \(3, 5\) for labels of shape \(3, 6\)"):
        valid_rows(LABELS, MASK[:, :-1])
