"""Teachers that say the same whenever they are asked, and small caches of them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from moekit.distill.fused import Head
from moekit.distill.teacher_cache import CachedRows, CacheSpec, build_cache
from safetensors import safe_open

SOURCE = {"model": "a" * 64, "tokenizer": "b" * 64, "data": "c" * 64}
SPECS = {
    "hidden": CacheSpec(kind="hidden", num_examples=11, source=SOURCE, shard_examples=3),
    "top-k": CacheSpec(kind="top-k", top_k=4, num_examples=11, source=SOURCE, shard_examples=3),
    "logits": CacheSpec(kind="logits", num_examples=11, source=SOURCE, shard_examples=3),
}
HEAD = Head(
    weight=torch.arange(26.0).reshape(13, 2).bfloat16(),
    bias=torch.arange(13.0),
    softcap=30.0,
    scale=0.5,
    num_columns=11,
)
HEADS = {"hidden": HEAD, "top-k": None, "logits": None}
EVERY_KIND = pytest.mark.parametrize("kind", SPECS)


def say(kind: str, examples: list[int] | range, dtype: torch.dtype = torch.float32) -> CachedRows:
    """Every fourth example has no rows; each says the same whenever it is asked."""
    num_rows = torch.tensor([example % 4 for example in examples], dtype=torch.int64)
    width = 2 if kind == "hidden" else 9
    rows = [
        torch.randn(example % 4, width, generator=torch.Generator().manual_seed(example))
        for example in examples
    ]
    states = torch.cat([torch.empty(0, width), *rows]).to(dtype)
    if kind != "top-k":
        return CachedRows(num_rows, {kind: states})
    log_probs, ids = states.log_softmax(-1).topk(4, dim=-1)
    return CachedRows(num_rows, {"log_probs": log_probs, "ids": ids.to(torch.int32)})


class Teacher:
    """Says it, counts how often, and may die instead."""

    def __init__(self, kind: str, *, dies_at: int | None = None, dtype: torch.dtype = torch.float32) -> None:
        self.kind, self.dies_at, self.dtype = kind, dies_at, dtype
        self.asked: list[int] = []

    def __call__(self, examples: range) -> CachedRows:
        self.asked.append(examples.start)
        if examples.start == self.dies_at:
            raise KeyboardInterrupt
        return say(self.kind, examples, self.dtype)


def meet_nobody() -> None:
    """The barrier of processes that are called one after the other."""


def build(folder: Path, kind: str, teacher: Callable[[range], CachedRows] | None = None, **arguments) -> None:
    arguments = {"barrier": meet_nobody} | arguments
    build_cache(folder, SPECS[kind], teacher or Teacher(kind), head=HEADS[kind], **arguments)


def same(actual: CachedRows, expected: CachedRows) -> None:
    assert torch.equal(actual.num_rows, expected.num_rows)
    assert actual.tensors.keys() == expected.tensors.keys()
    for name, tensor in actual.tensors.items():
        assert tensor.dtype == expected.tensors[name].dtype
        assert torch.equal(tensor, expected.tensors[name])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()
