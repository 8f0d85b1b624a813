"""The losses of distributions: limits, bounds, what the top-k keep, and refusals."""

import math
from itertools import pairwise

import pytest
import torch
from moekit.distill.losses import (
    bild,
    cached_top_k_kl,
    dkd,
    jsd,
    kl,
    reverse_kl,
    skewed_kl,
    skewed_reverse_kl,
    top_k_kl,
    uld,
)

from .calls import LABELS, NUM_CLASSES, VARIANTS, call, logits


def cache(teacher, k):
    """What a cache keeps: log-probabilities of temperature 1 and ids, in an order of its own."""
    log_probs, ids = teacher.log_softmax(-1).topk(k, dim=-1)
    return log_probs.flip(-1), ids.flip(-1)


def test_kl_by_hand():
    student = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64)
    teacher = torch.zeros(1, 2, dtype=torch.float64)
    assert float(kl(student, teacher)) == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2))
    assert float(reverse_kl(student, teacher)) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


@pytest.mark.parametrize("variant", [name for name in VARIANTS if not name.startswith(("binary", "mse"))])
def test_losses_of_distributions_do_not_see_a_constant_of_a_row(variant):
    plain = call(variant, logits(0), logits(1))
    torch.testing.assert_close(call(variant, logits(0) + 3, logits(1) - 5), plain)


@pytest.mark.parametrize("loss", [kl, reverse_kl, jsd, skewed_kl, skewed_reverse_kl])
def test_gradient_does_not_shrink_with_the_temperature(loss):
    norms = []
    for temperature in (50.0, 100.0):
        student = logits(0).requires_grad_()
        loss(student, logits(1), temperature=temperature).sum().backward()
        norms.append(float(student.grad.norm()))
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_ends_of_jsd_are_the_two_kls(temperature):
    student, teacher = logits(0), logits(1)
    forward = kl(student, teacher, temperature=temperature)
    reverse = reverse_kl(student, teacher, temperature=temperature)
    options = {"temperature": temperature}
    assert torch.equal(jsd(student, teacher, beta=0.0, **options), forward)
    assert torch.equal(jsd(student, teacher, beta=1.0, **options), reverse)
    small = 1e-6
    low = jsd(student, teacher, beta=small, **options) / small
    high = jsd(student, teacher, beta=1 - small, **options) / small
    torch.testing.assert_close(low, forward, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(high, reverse, rtol=1e-3, atol=1e-6)


def test_jsd_in_the_middle_is_symmetric_and_at_most_log_2():
    torch.testing.assert_close(jsd(logits(0), logits(1)), jsd(logits(1), logits(0)))
    assert (jsd(1000 * logits(0), 1000 * logits(1)) <= math.log(2) + 1e-12).all()


def test_skew_bounds_the_loss_and_none_is_plain_kl():
    assert (skewed_kl(1000 * logits(0), 1000 * logits(1)) <= math.log(10) + 1e-12).all()
    assert (skewed_reverse_kl(1000 * logits(0), 1000 * logits(1)) <= math.log(10) + 1e-12).all()
    assert torch.equal(skewed_kl(logits(0), logits(1), skew=0.0), kl(logits(0), logits(1)))
    assert torch.equal(skewed_reverse_kl(logits(0), logits(1), skew=0.0), reverse_kl(logits(0), logits(1)))


@pytest.mark.parametrize("rest", ["class", "renormalise"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_of_all_classes_is_the_full_kl(rest, temperature):
    full = kl(logits(0), logits(1), temperature=temperature)
    options = {"temperature": temperature, "rest": rest}
    torch.testing.assert_close(top_k_kl(logits(0), logits(1), k=NUM_CLASSES, **options), full)
    torch.testing.assert_close(cached_top_k_kl(logits(0), *cache(logits(1), NUM_CLASSES), **options), full)


def test_rest_as_a_class_is_a_lower_bound_that_rises_with_k():
    losses = [top_k_kl(logits(0), logits(1), k=k) for k in range(1, NUM_CLASSES + 1)]
    for smaller, larger in pairwise(losses):
        assert (smaller <= larger + 1e-12).all()


@pytest.mark.parametrize("rest", ["class", "renormalise"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
def test_cache_gives_what_full_logits_give(rest, temperature, ids_dtype):
    found = []
    log_probs, ids = cache(logits(1), 4)
    for from_cache in (True, False):
        student = logits(0).requires_grad_()
        if from_cache:
            loss = cached_top_k_kl(student, log_probs, ids.to(ids_dtype), temperature=temperature, rest=rest)
        else:
            loss = top_k_kl(student, logits(1), k=4, temperature=temperature, rest=rest)
        loss.sum().backward()
        found.append((loss, student.grad))
    for cached, full in zip(*found, strict=True):
        torch.testing.assert_close(cached, full, rtol=1e-10, atol=1e-12)


def test_renormalised_top_k_lets_go_of_the_rest_and_a_class_does_not():
    student = logits(1)
    outside = student.topk(3).indices[:, -1:]
    moved = torch.where(student < student.gather(-1, outside), student + 1, student)
    torch.testing.assert_close(
        top_k_kl(moved, logits(1), k=3, rest="renormalise"), torch.zeros(5, dtype=torch.float64)
    )
    assert (top_k_kl(moved, logits(1), k=3) > 1e-3).all()


def test_cache_that_rounds_to_more_than_everything_stays_finite():
    student = logits(0).float().requires_grad_()
    log_probs = torch.tensor([[-0.6914, -0.6914]], dtype=torch.bfloat16).expand(5, 2)
    assert float(log_probs.float().exp().sum(-1)[0]) > 1
    loss = cached_top_k_kl(student, log_probs, torch.tensor([[0, 1]]).expand(5, 2))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert student.grad.isfinite().all()


def test_dkd_with_the_teachers_own_weight_is_the_kl():
    teacher_rest = 1 - float(logits(1)[:1].softmax(-1)[0, 0])
    decoupled = dkd(
        logits(0)[:1], logits(1)[:1], labels_N=torch.tensor([0]), temperature=1.0, beta=teacher_rest
    )
    torch.testing.assert_close(decoupled, kl(logits(0)[:1], logits(1)[:1]))


def test_bild_reads_no_token_that_neither_side_chose():
    student, teacher = logits(0), logits(1)
    chosen = torch.zeros_like(student, dtype=torch.bool)
    for leader in (student, teacher):
        chosen.scatter_(1, leader.topk(4).indices, True)
    lower = torch.where(chosen, student, student - 3)
    torch.testing.assert_close(bild(lower, teacher, k=4), bild(student, teacher, k=4))


def test_uld_sees_neither_order_nor_padding_of_no_probability():
    student, teacher = logits(0), logits(1)
    permuted = student[:, torch.randperm(NUM_CLASSES)]
    torch.testing.assert_close(uld(permuted, teacher), uld(student, teacher))
    padded = torch.nn.functional.pad(teacher, (0, 5), value=-1000.0)
    torch.testing.assert_close(uld(student, padded), uld(student, teacher))
    wide = torch.zeros(1, 4, dtype=torch.float64)
    narrow = torch.zeros(1, 2, dtype=torch.float64)
    assert float(uld(wide, narrow)) == 1.0  # 2 |1/4 - 1/2| + 2 (1/4)


@pytest.mark.parametrize("beta", [-0.1, 1.1, float("nan")])
def test_beta_out_of_range_is_refused(beta):
    with pytest.raises(ValueError, match=f"beta={beta} is not between 0"):
        jsd(logits(0), logits(1), beta=beta)


@pytest.mark.parametrize("loss", [skewed_kl, skewed_reverse_kl])
@pytest.mark.parametrize("skew", [-0.1, 1.0, float("nan")])
def test_skew_out_of_range_is_refused(loss, skew):
    with pytest.raises(ValueError, match=f"skew={skew} is not at least 0 and below 1"):
        loss(logits(0), logits(1), skew=skew)


def test_numbers_of_tokens_out_of_range_are_refused():
    with pytest.raises(ValueError, match="k=12 is not between 1 and the 11 classes"):
        top_k_kl(logits(0), logits(1), k=12)
    with pytest.raises(ValueError, match="k=1 is not between 2 and"):
        top_k_kl(logits(0), logits(1), k=1, rest="renormalise")
    with pytest.raises(ValueError, match="k=2 is not between 3 and"):
        bild(logits(0), logits(1), k=2)
    with pytest.raises(ValueError, match="rest='drop' is not one of class, renormalise"):
        top_k_kl(logits(0), logits(1), k=3, rest="drop")


@pytest.mark.usefixtures("shapes_unchecked")
def test_cache_of_other_rows_is_refused():
    with pytest.raises(ValueError, match=r"\(5, 11\).*\(4, 3\).*of the same rows"):
        cached_top_k_kl(logits(0), *cache(logits(1)[:4], 3))


def test_dkd_refuses_two_classes_and_labels_that_are_not_classes():
    with pytest.raises(ValueError, match=r"2 classes; .* at least 3"):
        dkd(logits(0, classes=2), logits(1, classes=2), labels_N=LABELS % 2)
    for bad in (-100, NUM_CLASSES):
        labels = LABELS.clone()
        labels[1] = bad
        with pytest.raises(ValueError, match=rf"labels from .*{bad}.*valid_rows"):
            dkd(logits(0), logits(1), labels_N=labels)


@pytest.mark.parametrize("weight", ["alpha", "beta"])
@pytest.mark.parametrize("value", [-1.0, float("inf")])
def test_dkd_refuses_weights_that_are_none(weight, value):
    with pytest.raises(ValueError, match=f"{weight}={value} is not a finite number of at least 0"):
        dkd(logits(0), logits(1), labels_N=LABELS, **{weight: value})
