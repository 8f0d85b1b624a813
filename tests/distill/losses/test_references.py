"""Every loss against its formula written with loops, term by term, in Python's floats."""

import math

import pytest
import torch
from moekit.distill.losses import LOSSES

from .calls import LABELS, VARIANTS, call, logits


def softmax(values):
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


def kl_of(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def mix(p, q, share):
    return [share * a + (1 - share) * b for a, b in zip(p, q, strict=True)]


def center_row(values, center):
    if center == "mean":
        return [value - sum(values) / len(values) for value in values]
    if center == "logprob":
        return [math.log(p) for p in softmax(values)]
    return values


def reduced(terms, reduction):
    return sum(terms) / (len(terms) if reduction == "mean" else 1)


def coin_kl(p, q):
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def binary_kl_row(s, t, tau, center="none", reduction="sum"):
    pairs = zip(center_row(s, center), center_row(t, center), strict=True)
    return reduced([tau**2 * coin_kl(sigmoid(b / tau), sigmoid(a / tau)) for a, b in pairs], reduction)


def binary_kl_norm_row(s, t, tau, center="none", reduction="sum"):
    pairs = zip(center_row(s, center), center_row(t, center), strict=True)
    return reduced([tau**2 * coin_kl(0.5, sigmoid((a - b) / tau)) for a, b in pairs], reduction)


def mse_row(s, t, tau, center="none", reduction="mean"):
    pairs = zip(center_row(s, center), center_row(t, center), strict=True)
    return reduced([(a - b) ** 2 for a, b in pairs], reduction)


def distributions(s, t, tau):
    return softmax([value / tau for value in s]), softmax([value / tau for value in t])


def kl_row(s, t, tau):
    student, teacher = distributions(s, t, tau)
    return tau**2 * kl_of(teacher, student)


def reverse_kl_row(s, t, tau):
    student, teacher = distributions(s, t, tau)
    return tau**2 * kl_of(student, teacher)


def skewed_kl_row(s, t, tau, skew=0.1):
    student, teacher = distributions(s, t, tau)
    return tau**2 * kl_of(teacher, mix(teacher, student, skew))


def skewed_reverse_kl_row(s, t, tau, skew=0.1):
    student, teacher = distributions(s, t, tau)
    return tau**2 * kl_of(student, mix(student, teacher, skew))


def jsd_row(s, t, tau, beta):
    student, teacher = distributions(s, t, tau)
    if beta == 0:
        return tau**2 * kl_of(teacher, student)
    if beta == 1:
        return tau**2 * kl_of(student, teacher)
    middle = mix(teacher, student, beta)
    return tau**2 * (beta * kl_of(teacher, middle) + (1 - beta) * kl_of(student, middle))


def ranking(values, k):
    return sorted(range(len(values)), key=lambda index: -values[index])[:k]


def top_k_kl_row(s, t, tau, k, rest="class"):
    ids = ranking(t, k)
    sides = []
    for values in (s, t):
        p = softmax(values)
        kept = [p[index] for index in ids]
        if rest == "class" and k < len(values):
            kept.append(1 - sum(kept))
        powers = [mass ** (1 / tau) for mass in kept]
        sides.append([power / sum(powers) for power in powers])
    return tau**2 * kl_of(sides[1], sides[0])


def bild_row(s, t, tau, k):
    total = 0.0
    for leader in (t, s):
        ids = ranking(leader, k)
        pairs = [(ids[i], ids[j]) for i in range(k) for j in range(i + 1, k)]
        student = softmax([(s[i] - s[j]) / tau for i, j in pairs])
        teacher = softmax([(t[i] - t[j]) / tau for i, j in pairs])
        total += kl_of(teacher, student)
    return tau**2 * total


def dkd_row(s, t, tau, label, alpha=1.0, beta=8.0):
    student, teacher = distributions(s, t, tau)
    tckd = kl_of([teacher[label], 1 - teacher[label]], [student[label], 1 - student[label]])
    others = [index for index in range(len(s)) if index != label]
    student_others = [student[index] / (1 - student[label]) for index in others]
    teacher_others = [teacher[index] / (1 - teacher[label]) for index in others]
    return tau**2 * (alpha * tckd + beta * kl_of(teacher_others, student_others))


def uld_row(s, t, tau):
    student = sorted(softmax([value / tau for value in s]), reverse=True)
    teacher = sorted(softmax([value / tau for value in t]), reverse=True)
    length = max(len(student), len(teacher))
    student += [0.0] * (length - len(student))
    teacher += [0.0] * (length - len(teacher))
    return sum(abs(a - b) for a, b in zip(student, teacher, strict=True))


ROWS = {
    "bild": bild_row,
    "binary-kl": binary_kl_row,
    "binary-kl-norm": binary_kl_norm_row,
    "dkd": dkd_row,
    "jsd": jsd_row,
    "kl": kl_row,
    "mse": mse_row,
    "reverse-kl": reverse_kl_row,
    "skewed-kl": skewed_kl_row,
    "skewed-reverse-kl": skewed_reverse_kl_row,
    "top-k-kl": top_k_kl_row,
    "uld": uld_row,
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_loss_is_what_the_loops_compute(variant, temperature):
    name, options = VARIANTS[variant]
    expected = []
    for row, (s, t) in enumerate(zip(logits(0).tolist(), logits(1).tolist(), strict=True)):
        label = {"label": int(LABELS[row])} if LOSSES[name].needs_labels else {}
        expected.append(ROWS[name](s, t, temperature, **options, **label))
    computed = call(variant, logits(0), logits(1), temperature=temperature)
    assert computed.tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("widths", [(11, 17), (17, 11)])
def test_uld_of_two_vocabularies_is_what_the_loops_compute(widths):
    student, teacher = logits(0, classes=widths[0]), logits(1, classes=widths[1])
    expected = [uld_row(s, t, 2.0) for s, t in zip(student.tolist(), teacher.tolist(), strict=True)]
    computed = LOSSES["uld"].function(student, teacher, temperature=2.0)
    assert computed.tolist() == pytest.approx(expected, rel=1e-12)


def test_defaults_are_those_of_the_papers():
    student, teacher = logits(0).tolist()[0], logits(1).tolist()[0]
    for name, expected in {
        "bild": bild_row(student, teacher, 3.0, 8),
        "binary-kl": binary_kl_row(student, teacher, 2.0),
        "binary-kl-norm": binary_kl_norm_row(student, teacher, 2.0),
        "dkd": dkd_row(student, teacher, 4.0, 0),
        "jsd": jsd_row(student, teacher, 1.0, 0.5),
    }.items():
        labels = {"labels_N": torch.tensor([0])} if LOSSES[name].needs_labels else {}
        computed = LOSSES[name].function(logits(0)[:1], logits(1)[:1], **labels)
        assert float(computed) == pytest.approx(expected, rel=1e-9), name
