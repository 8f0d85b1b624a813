"""Measures of collapse on features that are known."""

import math

import pytest
import torch
from moekit.distill.neural_collapse import gradient_cosine, neural_collapse

CLASSES, WIDTH = 4, 8


def simplex():
    """Rows of equal length at equal angles."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(WIDTH, CLASSES, generator=generator, dtype=torch.float64)).Q
    return ((torch.eye(CLASSES, dtype=torch.float64) - 1 / CLASSES) @ basis.T).float()


def test_a_collapsed_model_measures_zero():
    rows = simplex()
    labels = torch.arange(20) % CLASSES
    found = neural_collapse(3 * rows[labels] + 5, labels, 0.5 * rows)
    for value in (getattr(found, name) for name in found.__slots__):
        assert value == pytest.approx(0, abs=2e-4)


def test_each_measure_sees_its_own_fault():
    rows, labels = simplex(), torch.arange(40) % CLASSES
    noise = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(1))
    assert neural_collapse(rows[labels] + 0.1 * noise, labels, rows).within_class > 0.01
    scales = torch.tensor([1.0, 1, 1, 3])[:, None]
    assert neural_collapse((rows * scales)[labels], labels, rows).mean_lengths > 0.1
    crooked = rows.clone()
    crooked[0] += crooked[1]
    assert neural_collapse(rows[labels], labels, crooked).classifier_angles > 0.05
    turned = neural_collapse(rows[labels], labels, rows.roll(1, 0))
    assert turned.classifier_angles < 1e-4
    assert turned.duality > 0.5


def test_within_class_spread_by_hand():
    """Two classes at +1 and -1, each with examples 0.5 to either side: S_W = 0.25, S_B = 1."""
    features = torch.tensor([[1.5], [0.5], [-1.5], [-0.5]])
    labels = torch.tensor([0, 0, 1, 1])
    assert neural_collapse(features, labels, torch.tensor([[1.0], [-1.0]])).within_class == pytest.approx(
        0.125
    )


def test_missing_classes_are_refused():
    with pytest.raises(ValueError, match="each needs one at least"):
        neural_collapse(torch.randn(4, WIDTH), torch.zeros(4, dtype=torch.long), simplex())
    with pytest.raises(ValueError, match="above 3"):
        neural_collapse(torch.randn(5, WIDTH), torch.arange(5), simplex())


def test_cosines_of_gradients():
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    assert gradient_cosine(weight.sum(), weight.sum() * 2, [weight]) == pytest.approx(1)
    assert gradient_cosine(weight.sum(), -weight.sum(), [weight]) == pytest.approx(-1)
    assert gradient_cosine(weight[0], weight[1], [weight]) == 0
    assert gradient_cosine(weight.square().sum(), weight[0], [weight]) == pytest.approx(0.6)
    other = torch.tensor(1.0, requires_grad=True)
    assert math.isnan(gradient_cosine(weight.sum(), other.square(), [weight]))
