import pytest
import torch
from moekit.rl.generation.growing_cache import GrowingLayer, GrowingSlidingLayer, GrowingTensor, growing_cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .models import model_of

PAIRS = [
    (GrowingLayer, DynamicLayer, {}),
    (GrowingSlidingLayer, DynamicSlidingWindowLayer, {"sliding_window": 5}),
]


def states(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 2, length, 3), torch.randn(rows, 2, length, 4)


@pytest.mark.parametrize(("growing", "dynamic", "options"), PAIRS)
@pytest.mark.parametrize("prompt", [1, 3, 9])
def test_it_holds_what_a_concatenating_layer_holds(growing, dynamic, options, prompt):
    ours, theirs = growing(**options), dynamic(**options)
    rows = 2
    for step in range(180):
        new = states(rows, prompt if step == 0 else 1)
        for mine, wanted in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(mine, wanted)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)
        if step in (0, 60, 61, 150):
            chosen = torch.tensor([1, 0, 1][: 3 if step < 61 else 2])
            rows = len(chosen)
            ours.reorder_cache(chosen)
            theirs.reorder_cache(chosen)


def test_growing_copies_nothing_but_the_new_columns():
    growing = GrowingTensor()
    held = growing.append(torch.empty(0), torch.randn(1, 1, 4, 2))
    first = held.data_ptr()
    for _ in range(60):
        held = growing.append(held, torch.randn(1, 1, 1, 2))
        assert held.data_ptr() == first
    assert held.shape == (1, 1, 64, 2)


def test_a_tensor_from_elsewhere_is_taken_over():
    growing = GrowingTensor()
    growing.append(torch.empty(0), torch.zeros(1, 1, 4, 2))
    other, new = torch.ones(1, 1, 4, 2), torch.full((1, 1, 1, 2), 2.0)
    assert torch.equal(growing.append(other, new), torch.cat([other, new], dim=-2))


def test_every_kind_of_layer_keeps_its_kind():
    kinds = [type(layer) for layer in growing_cache(model_of("gemma2").config).layers]
    assert kinds == [GrowingSlidingLayer, GrowingLayer]
    assert GrowingLayer not in [
        type(layer) for layer in growing_cache(model_of("qwen3_next").config).layers[:1]
    ]
