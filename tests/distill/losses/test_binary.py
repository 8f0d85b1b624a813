"""The losses of raw logits: values by hand, saturation, centring, the weight rule."""

import math

import pytest
import torch
from moekit.distill.losses import (
    binary_kl,
    binary_kl_norm,
    kl,
    logit_mse,
    masked_mean,
    published_weight,
)
from moekit.distill.losses.log_cosh import log_cosh

from .calls import logits

LOGIT_LOSSES = [binary_kl, binary_kl_norm, logit_mse]


def one(loss, student, teacher, temperature):
    """Loss and gradient of one class, in double precision."""
    values = torch.tensor([[student]], dtype=torch.float64, requires_grad=True)
    result = loss(values, torch.tensor([[teacher]], dtype=torch.float64), temperature=temperature)
    result.sum().backward()
    return result.item(), values.grad.item()


@pytest.mark.parametrize(
    ("difference", "temperature", "value", "gradient"),
    [
        (0.0, 1.0, 0.0, 0.0),
        (0.5, 1.0, 0.0309298036, 0.1224593312),
        (-1.0, 1.0, 0.1201145070, -0.2310585786),
        (2.0, 1.0, 0.4337808305, 0.3807970780),
        (4.0, 1.0, 1.3250027474, 0.4820137900),
        (10.0, 1.0, 4.3068982183, 0.4999546021),
        (-10.0, 1.0, 4.3068982183, -0.4999546021),
        (40.0, 1.0, 19.3068528194, 0.5),
        (1e4, 1.0, 4999.3068528194, 0.5),
        (0.0, 2.0, 0.0, 0.0),
        (0.5, 2.0, 0.0311689573, 0.1243530018),
        (-1.0, 2.0, 0.1237192145, -0.2449186624),
        (2.0, 2.0, 0.4804580278, 0.4621171573),
        (4.0, 2.0, 1.7351233219, 0.7615941560),
        (10.0, 2.0, 7.2542726717, 0.9866142982),
        (-10.0, 2.0, 7.2542726717, -0.9866142982),
        (40.0, 2.0, 37.2274112860, 0.9999999959),
        (1e4, 2.0, 9997.2274112778, 1.0),
    ],
)
def test_binary_kl_norm_of_one_class(difference, temperature, value, gradient):
    got = one(binary_kl_norm, 0.75 + difference, 0.75, temperature)
    assert got == pytest.approx((value, gradient), rel=1e-9, abs=1e-10)


@pytest.mark.parametrize(
    ("student", "teacher", "temperature", "value", "gradient"),
    [
        (1.0, 2.0, 2.0, 0.1053783439, -0.2171984949),
        (-3.0, 0.5, 2.0, 1.4371309386, -0.7595019542),
        (8.0, 8.0, 2.0, 0.0, 0.0),
        (0.0, 4.0, 1.0, 0.6030524128, -0.4820137900),
    ],
)
def test_binary_kl_of_one_class(student, teacher, temperature, value, gradient):
    got = one(binary_kl, student, teacher, temperature)
    assert got == pytest.approx((value, gradient), rel=1e-9, abs=1e-10)


def test_batch_by_hand():
    student = torch.tensor([[1, -2, 0.5], [0, 3, -1]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[2, -1, 0.5], [-4, 3.5, 1]], dtype=torch.float64)
    loss = masked_mean(binary_kl_norm(student, teacher))
    loss.backward()
    assert loss.item() == pytest.approx(1.2470943680, rel=1e-10)
    expected = [[-0.1224593312, -0.1224593312, 0], [0.3807970780, -0.0621765009, -0.2310585786]]
    torch.testing.assert_close(
        student.grad, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-10
    )


def test_binary_kl_norm_is_binary_kl_against_a_fair_coin():
    difference = logits(0) - logits(1)
    torch.testing.assert_close(
        binary_kl_norm(logits(0), logits(1)),
        binary_kl(difference, torch.zeros_like(difference)),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradient_of_binary_kl_norm_saturates_at_half_the_temperature(sign, dtype, temperature):
    student = torch.full((1, 3), sign * 1e4, dtype=dtype, requires_grad=True)
    loss = binary_kl_norm(student, torch.zeros(1, 3, dtype=dtype), temperature=temperature)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert torch.equal(student.grad, torch.full_like(student, sign * temperature / 2))


@pytest.mark.parametrize("sign", [1, -1])
def test_gradient_of_binary_kl_saturates_at_the_temperature(sign):
    student = torch.full((1, 3), sign * 1e4, requires_grad=True)
    loss = binary_kl(student, torch.full((1, 3), -sign * 1e4))
    loss.sum().backward()
    assert float(loss.detach()) == pytest.approx(3 * 2 * 1e4)
    assert torch.equal(student.grad, torch.full_like(student, sign * 2.0))


def test_log_cosh_keeps_its_digits_near_zero_and_far_away():
    x = torch.tensor([0.0, 1e-4, -1e-3, 0.5, 0.999999, 1.000001, -3.0, 50.0, 1e6], dtype=torch.float32)
    expected = [
        math.log(math.cosh(value)) if abs(value) < 300 else abs(value) - math.log(2) for value in x.tolist()
    ]
    # In double precision cosh(1e-4) is 1 + 5e-9, whose logarithm keeps eight digits.
    assert log_cosh(x).tolist() == pytest.approx(expected, rel=1e-6)
    assert torch.autograd.gradcheck(log_cosh, (x[:-2].double().requires_grad_(),))
    assert torch.autograd.gradgradcheck(log_cosh, (x[:-2].double().requires_grad_(),))


@pytest.mark.parametrize("loss", LOGIT_LOSSES)
@pytest.mark.parametrize("center", ["mean", "logprob"])
def test_centred_losses_do_not_see_a_constant_of_a_row(loss, center):
    shifts = torch.tensor([[3.0], [-7.0], [0.1], [100.0], [-0.5]], dtype=torch.float64)
    plain = loss(logits(0), logits(1), center=center)
    torch.testing.assert_close(loss(logits(0) + shifts, logits(1), center=center), plain)
    torch.testing.assert_close(loss(logits(0), logits(1) + shifts, center=center), plain)


@pytest.mark.parametrize("loss", LOGIT_LOSSES)
def test_losses_as_in_the_paper_do_see_it(loss):
    assert (loss(logits(0) + 1, logits(0)) > 0).all()


@pytest.mark.parametrize("center", ["mean", "logprob"])
def test_centred_gradient_leaves_the_constant_alone(center):
    student = logits(0).requires_grad_()
    binary_kl_norm(student, logits(1), center=center).sum().backward()
    torch.testing.assert_close(student.grad.sum(-1), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)


def test_log_probabilities_of_a_teacher_will_do():
    by_logits = binary_kl_norm(logits(0), logits(1), center="logprob")
    by_log_probabilities = binary_kl_norm(logits(0), logits(1).log_softmax(-1), center="logprob")
    torch.testing.assert_close(by_logits, by_log_probabilities)


@pytest.mark.parametrize("num_classes", [100, 1000])
def test_sum_and_mean_agree_after_the_weight_rule(num_classes):
    student, teacher = logits(0, classes=num_classes), logits(1, classes=num_classes)
    summed = published_weight(num_classes, "sum") * binary_kl_norm(student, teacher)
    averaged = published_weight(num_classes, "mean") * binary_kl_norm(student, teacher, reduction="mean")
    torch.testing.assert_close(summed, averaged)
    assert published_weight(num_classes, "sum") == {100: 1.0, 1000: 0.1}[num_classes]


def test_half_the_squared_error_is_the_kl_of_a_high_temperature():
    torch.testing.assert_close(
        kl(logits(0), logits(1), temperature=1e4) * 11,
        logit_mse(logits(0), logits(1), center="mean") * 11 / 2,
        rtol=1e-3,
        atol=1e-4,
    )


@pytest.mark.parametrize("loss", LOGIT_LOSSES)
def test_words_that_are_no_option_are_refused(loss):
    with pytest.raises(ValueError, match="center='median' is not one of none, mean, logprob"):
        loss(logits(0), logits(1), center="median")
    with pytest.raises(ValueError, match="reduction='max' is not one of sum, mean"):
        loss(logits(0), logits(1), reduction="max")


def test_weight_of_no_class_is_refused():
    with pytest.raises(ValueError, match="num_classes=0"):
        published_weight(0, "sum")
    with pytest.raises(ValueError, match="reduction='max'"):
        published_weight(3, "max")
