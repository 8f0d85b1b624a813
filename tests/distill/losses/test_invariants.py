"""What every loss has in common."""

import pytest
import torch
from moekit.distill.losses import LOSSES, masked_mean

from .calls import LABELS, NUM_CLASSES, VARIANTS, call, logits

every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_loss = pytest.mark.parametrize("name", LOSSES)


def test_every_loss_has_a_variant_and_the_names_are_sorted():
    assert {name for name, _ in VARIANTS.values()} == set(LOSSES)
    assert list(LOSSES) == sorted(LOSSES)


@every_variant
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_loss_and_gradient_are_zero_where_the_student_is_the_teacher(variant, temperature):
    student = logits(0).requires_grad_()
    loss = call(variant, student, logits(0), temperature=temperature)
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-14)
    torch.testing.assert_close(student.grad, torch.zeros_like(student), rtol=0, atol=1e-14)


@every_variant
def test_loss_is_positive_where_they_differ(variant):
    assert (call(variant, logits(0), logits(1)) > 0).all()


@every_variant
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_gradient_is_that_of_finite_differences(variant, temperature):
    student = logits(0).requires_grad_()
    teacher = logits(1)
    assert torch.autograd.gradcheck(
        lambda values: call(variant, values, teacher, temperature=temperature), (student,)
    )


@every_variant
def test_teacher_is_a_constant(variant):
    student, teacher = logits(0).requires_grad_(), logits(1).requires_grad_()
    call(variant, student, teacher).sum().backward()
    assert student.grad is not None
    assert teacher.grad is None


@every_variant
def test_inputs_stay_as_they_are(variant):
    student, teacher = logits(0), logits(1)
    call(variant, student, teacher)
    assert torch.equal(student, logits(0))
    assert torch.equal(teacher, logits(1))


@every_variant
def test_each_row_has_a_loss_of_its_own(variant):
    whole = call(variant, logits(0), logits(1))
    assert whole.shape == (len(LABELS),)
    for row in range(len(LABELS)):
        one = slice(row, row + 1)
        labels = {"labels_N": LABELS[one]} if LOSSES[VARIANTS[variant][0]].needs_labels else {}
        alone = call(variant, logits(0)[one], logits(1)[one], **labels)
        torch.testing.assert_close(alone, whole[one], rtol=1e-12, atol=1e-14)


@every_variant
def test_half_precision_is_computed_in_single(variant):
    student, teacher = logits(0).bfloat16(), logits(1).bfloat16()
    loss = call(variant, student, teacher, temperature=3.0)
    assert loss.dtype == torch.float32
    exact = call(variant, student.double(), teacher.double(), temperature=3.0)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=1e-5)


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_logits_give_finite_losses_and_gradients(variant, dtype):
    student = (5000 * logits(0)).to(dtype).requires_grad_()
    loss = call(variant, student, (-5000 * logits(1)).to(dtype))
    loss.sum().backward()
    assert student.grad is not None
    assert loss.isfinite().all()
    assert student.grad.isfinite().all()


@every_variant
def test_without_rows_the_mean_is_a_zero_with_a_gradient(variant):
    hidden, head = torch.randn(4, 3), torch.randn(NUM_CLASSES, 3, requires_grad=True)
    packed = hidden[:0] @ head.T
    loss = masked_mean(call(variant, packed, torch.zeros(0, NUM_CLASSES)))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(head.grad, torch.zeros_like(head))


@every_variant
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_temperature_that_is_none_is_refused(variant, temperature):
    with pytest.raises(ValueError, match=f"temperature={temperature} is not a finite number above 0"):
        call(variant, logits(0), logits(1), temperature=temperature)


@pytest.mark.usefixtures("shapes_unchecked")
@every_loss
def test_other_vocabularies_are_refused_with_what_to_use_instead(name):
    if not LOSSES[name].needs_same_vocabulary:
        assert LOSSES[name].function(logits(0), logits(1, classes=16)).shape == (len(LABELS),)
        return
    with pytest.raises(ValueError, match=r"\(5, 11\).*\(5, 16\).*drop_padded_columns.*uld"):
        call(name, logits(0), logits(1, classes=16))


@pytest.mark.usefixtures("shapes_unchecked")
@every_loss
def test_other_rows_are_refused(name):
    with pytest.raises(ValueError, match=r"\(5, 11\).*\(4, 11\).*rows differ.*valid_rows"):
        call(name, logits(0), logits(1, rows=4))


@pytest.mark.usefixtures("shapes_unchecked")
@every_loss
def test_unpacked_batches_are_refused(name):
    with pytest.raises(ValueError, match=r"\(1, 5, 11\).*pack .* with valid_rows"):
        call(name, logits(0)[None], logits(1)[None])
