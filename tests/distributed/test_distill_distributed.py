"""`moekit distill` on two processes, with CPUs and gloo: the same as on one, and the same after a kill."""

from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ..scripts.tiny_checkpoints import tiny_qwen, write_checkpoint
from ..scripts.tiny_training import tiny_llama, write_dense
from .conftest import Once
from .launch import BACKENDS, SHOWN, launch
from .runs import (
    LOOP,
    SAVED_AT,
    STEPS,
    Words,
    alone,
    assert_goes_on,
    assert_same,
    assert_worked_together,
    logged,
    prepare,
    together,
    words,
)

SUPPORTED = [name for name in BACKENDS if name != "zero3"]
DHKD = {
    "loss": "dhkd",
    "center": "mean",
    "auxiliary_head": "copy",  # the bottleneck would draw for dropout, in each process other numbers
    "align_gradients": True,
    "align_smoothing": 0.5,
}
STOP_EPOCH = 0.1
"""Between the second of 25 steps of an epoch and the third, after which a checkpoint is written."""
SHORT = 5
"""Tokens of a row, for more rows than a shard of a teacher cache holds."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def models(once) -> Path:
    """Students, and a teacher that is surer of itself, and wrong: what it says and the labels disagree."""

    def fill(folder: Path) -> None:
        write_dense(folder / "tied", tiny_llama(attention_dropout=0.0, tie_word_embeddings=True))
        write_checkpoint(folder / "experts", tiny_qwen())
        model = tiny_llama(attention_dropout=0.0)
        write_dense(folder / "untied", model)
        with torch.no_grad():
            model.lm_head.weight.mul_(4)
        write_dense(folder / "teacher", model)

    return once("distill-models", fill)


@pytest.fixture(scope="session")
def cases(given, models) -> dict[str, Words]:
    """Commands by name."""

    def make(student: str, **changes: object) -> list[str]:
        options = LOOP | {"data": given[1], "teacher": models / "teacher"}
        return words("distill", models / student, options | changes)

    def cached(out: Path, **changes: object) -> list[str]:
        return make("tied", out=out, cache=out.with_name("cache"), seq_len=SHORT, **changes)

    dhkd = partial(make, "untied", **DHKD)
    return {
        "one-head": partial(make, "tied", temperature=2.0),
        "two-heads": dhkd,
        "accumulation": partial(dhkd, batch_size=1, gradient_accumulation=2),
        "second-phase": partial(dhkd, stop_epoch=STOP_EPOCH),
        "cache": cached,
        "experts": partial(make, "experts", load_balance=0.1),
    }


def assert_as_alone(
    once: Once, cases: dict[str, Words], case: str, backend: str, *, parts: int = 1, **changes: object
) -> tuple[Path, Path]:
    """Two processes, each with other rows, give the result of one; returns both."""
    name, make = f"distill-{case}", cases[case]
    folder = together(once, name, backend, make)
    command = make(out=folder)
    student = AutoModelForCausalLM.from_pretrained(command[1])
    second_head = student.lm_head.weight.numel() if "dhkd" in command else 0
    assert_worked_together(folder, BACKENDS[backend], student.num_parameters() + second_head, parts)
    other = alone(once, name, make, **changes)
    assert_same(folder / "out", other, 2e-5)
    return folder / "out", other


@pytest.mark.parametrize("backend", SUPPORTED)
@pytest.mark.parametrize("case", ["one-head", "two-heads"])
def test_two_processes_distill_as_one(once, cases, case, backend):
    out, _ = assert_as_alone(once, cases, case, backend)
    if case == "two-heads":
        assert min(logged(out, "alignment_factor")) > 1.5


def test_micro_batches_of_two_processes(once, cases):
    """The factor holds from the next step on, for one process too."""
    assert_as_alone(once, cases, "accumulation", "ddp", parts=2, batch_size=2)


def test_the_second_phase_on_two_processes(once, cases):
    """The second head stays, because DDP watches it, and is not heard."""
    out, _ = assert_as_alone(once, cases, "second-phase", "ddp")
    assert len(logged(out, "task")) == STEPS
    assert len(logged(out, "distillation")) == SAVED_AT


def test_two_processes_build_the_cache_of_one(once, cases):
    caches = [out.with_name("cache") for out in assert_as_alone(once, cases, "cache", "ddp")]
    ours, theirs = ({path.name: path.read_bytes() for path in cache.iterdir()} for cache in caches)
    assert ours == theirs
    assert "shard-00001.safetensors" in ours  # of the second process


def test_experts_of_two_processes_are_balanced_by_micro_batch(once, cases):
    assert_as_alone(once, cases, "experts", "ddp", batch_size=2, gradient_accumulation=2)


@pytest.mark.parametrize(
    ("case", "backend"), [*(("two-heads", name) for name in SUPPORTED), ("second-phase", "ddp")]
)
def test_a_killed_run_goes_on_to_the_same_weights(once, cases, case, backend):
    assert_goes_on(once, f"distill-{case}", backend, cases[case])


def test_zero_3_is_refused_before_the_training(cases, tmp_path):
    prepare("zero3")
    done = launch(BACKENDS["zero3"], tmp_path, cases["one-head"](out=tmp_path / "out"))
    assert done.returncode != 0
    assert "which DeepSpeed ZeRO-3 divides; take ZeRO-2 or FSDP2" in done.stdout, done.stdout[-SHOWN:]
    assert "step 1 of" not in done.stdout
    assert not (tmp_path / "out").exists()
