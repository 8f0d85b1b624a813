"""What the sweep does beside the mathematics: parts of the graph, precisions, empty batches, refusals."""

import pytest
import torch
from moekit.distill import fused
from moekit.distill.fused.tiles import tiles

from ..largest import Largest
from .head_samples import OBJECTIVES, Sample

NAMES = ["kl", "plain", "binary-none-sum", "binary-mean-mean"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_is_wanted_gets_a_gradient(name, wanted):
    objective, loss = OBJECTIVES[name]
    sample = Sample()
    leaves = sample.leaves
    for leaf, is_wanted in zip(leaves, wanted, strict=True):
        leaf.requires_grad_(is_wanted)
    (leaf,) = (leaf for leaf in leaves if leaf.requires_grad)
    (ours,) = torch.autograd.grad(sample.fused(objective), leaf)
    (dense,) = torch.autograd.grad(sample.dense(loss), leaf)
    torch.testing.assert_close(ours, dense, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_without_gradients_the_value_is_the_same(name):
    objective, _ = OBJECTIVES[name]
    sample = Sample()
    with torch.no_grad():
        loss = sample.fused(objective)
    assert not loss.requires_grad
    assert torch.equal(loss, sample.fused(objective).detach())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_rows_give_zero_in_the_graph(name):
    objective, _ = OBJECTIVES[name]
    sample = Sample(num_rows=0)
    loss = sample.fused(objective)
    assert loss.item() == 0
    loss.backward()
    assert sample.hidden.grad.shape == (0, 5)
    assert not sample.weight.grad.any()
    assert not sample.bias.grad.any()


def test_the_gradient_is_scaled_and_a_retained_graph_serves_again():
    sample = Sample()
    loss = sample.fused(fused.kl())
    first = sample.gradients(loss)
    for factor in (1.0, -2.5):
        again = torch.autograd.grad(factor * loss, sample.leaves, retain_graph=True)
        for ours, expected in zip(again, first, strict=True):
            torch.testing.assert_close(ours, factor * expected, rtol=1e-12, atol=1e-12)


def test_not_differentiable_twice():
    sample = Sample()
    (gradient,) = torch.autograd.grad(sample.fused(fused.kl()) ** 2, sample.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("num_items", [20, torch.tensor(20)])
def test_the_sum_is_divided_by_num_items(num_items):
    sample = Sample()
    whole, ours = sample.fused(fused.kl()), sample.fused(fused.kl(), num_items=num_items)
    torch.testing.assert_close(ours, whole * 7 / 20)
    torch.testing.assert_close(sample.gradients(ours)[1], sample.gradients(whole)[1] * 7 / 20)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_autocast", [False, True])
def test_bfloat16_products_with_wide_sums(name, is_autocast):
    objective, loss = OBJECTIVES[name]
    sample = Sample(torch.float32 if is_autocast else torch.bfloat16, has_bias=False)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
        ours = sample.fused(objective, tile_elements=23)
    assert ours.dtype == torch.float32
    exact = Sample(torch.bfloat16, has_bias=False)
    exact.hidden, exact.weight = (leaf.detach().double().requires_grad_() for leaf in exact.leaves)
    head = fused.Head(
        weight=exact.teacher.head.weight.double(), bias=exact.teacher.head.bias.double(), scale=0.5
    )
    exact.teacher = fused.TeacherStates(exact.teacher.hidden.double(), head)
    dense = exact.dense(loss)
    torch.testing.assert_close(ours.double(), dense, rtol=2e-2, atol=2e-2)
    for found, expected, leaf in zip(
        sample.gradients(ours), exact.gradients(dense), sample.leaves, strict=True
    ):
        assert found.dtype == leaf.dtype
        error = (found.double() - expected).norm() / expected.norm()
        assert error < 2e-2


def test_a_frozen_linear_layer_and_its_description():
    linear = torch.nn.Linear(4, 9)
    head = fused.Head.of(linear, scale=2.0, num_columns=8)
    assert head.weight is linear.weight
    assert head.bias is linear.bias
    assert head.width == 8


def test_chunks_are_of_equal_size_and_cover_everything():
    for whole_rows in (True, False):
        for num_rows, num_columns, most in ((0, 5, 3), (7, 5, 11), (7, 5, 1), (10, 3, 100)):
            count = torch.zeros(num_rows, num_columns)
            for rows, columns in tiles(num_rows, num_columns, whole_rows=whole_rows, tile_elements=most):
                count[rows, columns] += 1
                assert count[rows, columns].numel() <= max(most, num_columns if whole_rows else 1)
            assert count.eq(1).all()


def test_the_logits_of_all_rows_never_exist():
    hidden, weight = torch.randn(64, 4, requires_grad=True), torch.randn(128, 4, requires_grad=True)
    teacher = fused.TeacherStates(torch.randn(64, 4), fused.Head(weight=torch.randn(128, 4)))
    for objective in (fused.kl(), fused.binary_kl_norm(center="mean")):
        with Largest() as seen:
            head = fused.Head(weight=weight)
            fused.fused_loss(hidden, head, objective, teacher=teacher, tile_elements=1024).backward()
        assert seen.elements == 1024


def refuse(match, **changes):
    sample = Sample()
    given = {"hidden": sample.hidden, "head": sample.head, "objective": fused.kl(), "teacher": sample.teacher}
    with pytest.raises(ValueError, match=match):
        fused.fused_loss(**(given | changes))


def test_what_does_not_fit_is_refused():
    sample = Sample()
    refuse("teacher: got none", teacher=None)
    refuse("labels: got some", labels=sample.labels)
    refuse("labels: got none", objective=fused.cross_entropy(), teacher=None)
    refuse("teacher: got some", objective=fused.cross_entropy(), labels=sample.labels)
    refuse(r"have shape \(7, 13\) and the student's \(7, 11\)", teacher=torch.zeros(7, 13).double())
    refuse("tile_elements=0", tile_elements=0)
    refuse("num_items=-1", num_items=-1)
    refuse("hidden states have shape", hidden=torch.zeros(7, 6).double())


@pytest.mark.parametrize(
    ("match", "settings"),
    [("softcap=0", {"softcap": 0.0}), ("scale=0", {"scale": 0.0}), ("num_columns=4", {"num_columns": 4})],
)
def test_heads_that_make_no_sense_are_refused(match, settings):
    with pytest.raises(ValueError, match=match):
        fused.Head(weight=torch.zeros(3, 2), **settings)


@pytest.mark.parametrize(
    ("match", "make"),
    [
        ("temperature=0", lambda: fused.kl(temperature=0.0)),
        ("skew=1", lambda: fused.skewed_kl(skew=1.0)),
        ("beta=2", lambda: fused.jsd(beta=2.0)),
        ("center='median'", lambda: fused.binary_kl_norm(center="median")),
        ("reduction='max'", lambda: fused.binary_kl_norm(reduction="max")),
        ("no terms", fused.weighted_sum),
    ],
)
def test_objectives_that_make_no_sense_are_refused(match, make):
    with pytest.raises(ValueError, match=match):
        make()
