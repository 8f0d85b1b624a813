"""`moekit distill` on two processes, with CPUs and gloo: the same as on one, and the same after a kill."""

from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from moekit.distill import DualHeadStudent
from moekit.scripts import cli
from moekit.scripts.distill_checks import head_spec
from moekit.scripts.distill_options import DistillOptions

from ..scripts.tiny_checkpoints import tiny_qwen, write_checkpoint
from ..scripts.tiny_distillation import tiny_judge
from ..scripts.tiny_training import tiny_llama, write_dense, write_rows
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
    run_file,
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
CLASSIFIER = {
    "task": "classification",
    "loss": "dhkd",
    "auxiliary_width": 16,
    "auxiliary_norm": "rms",  # batch statistics would be those of each process
    "auxiliary_dropout": 0.0,
    "align_gradients": True,
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
        rows = write_rows(folder / "rows.jsonl")
        write_checkpoint(folder / "judge", tiny_judge(rows, ("salad", "sums")))

    return once("distill-models", fill)


@pytest.fixture(scope="session")
def cases(given, models) -> dict[str, Words]:
    """Commands by name."""

    def make(student: str, **changes: object) -> list[str]:
        options = LOOP | {"data": given[1], "teacher": models / "teacher"}
        return words("distill", models / student, options | changes)

    def cached(student: str, *, out: Path, **changes: object) -> list[str]:
        return make(student, out=out, cache=out.with_name("cache"), **changes)

    of_rows = {"data": models / "rows.jsonl", "teacher": models / "judge"}

    dhkd = partial(make, "untied", **DHKD)
    return {
        "one-head": partial(make, "tied", temperature=2.0),
        "two-heads": dhkd,
        "accumulation": partial(dhkd, batch_size=1, gradient_accumulation=2),
        "second-phase": partial(dhkd, stop_epoch=STOP_EPOCH),
        "cache": partial(cached, "tied", seq_len=SHORT),
        "classifier": partial(make, "untied", **CLASSIFIER, **of_rows),
        "experts": partial(make, "experts", load_balance=0.1),
        "everything": partial(
            cached,
            "experts",
            **DHKD,
            load_balance=0.1,
            stop_epoch=STOP_EPOCH,
            batch_size=1,
            gradient_accumulation=2,
        ),
    }


def num_parameters(out: Path, command: list[str]) -> int:
    """Of a result in training, with its second head."""
    options = cli.parse(command)
    assert isinstance(options, DistillOptions)
    student = getattr(transformers, run_file(out)["training"]["model_class"]).from_pretrained(out)
    trained = DualHeadStudent(student, head_spec(options)) if options.loss == "dhkd" else student
    return sum(parameter.numel() for parameter in trained.parameters())


def assert_as_alone(
    once: Once, cases: dict[str, Words], case: str, backend: str, *, parts: int = 1, **changes: object
) -> tuple[Path, Path]:
    """Two processes, each with other rows, give the result of one; returns both."""
    name, make = f"distill-{case}", cases[case]
    folder = together(once, name, backend, make)
    command = make(out=folder)
    assert_worked_together(folder, BACKENDS[backend], num_parameters(folder / "out", command), parts)
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


@pytest.mark.parametrize("backend", SUPPORTED)
def test_classifiers_of_two_processes(once, cases, backend):
    out, _ = assert_as_alone(once, cases, "classifier", backend)
    assert max(logged(out, "alignment_factor")) > 1


@pytest.mark.parametrize("backend", ["fsdp2", "zero2"])
def test_everything_at_once_where_states_are_divided(once, cases, backend):
    """Micro-batches, a cache, experts, and a second phase, in which the second head is not heard."""
    in_one = {"batch_size": 1, "gradient_accumulation": 4}
    out, _ = assert_as_alone(once, cases, "everything", backend, parts=2, **in_one)
    assert len(logged(out, "expert_load")) == len(logged(out, "task")) == STEPS
    assert len(logged(out, "distillation")) == SAVED_AT


@pytest.mark.parametrize(
    ("case", "backend"), [*(("two-heads", name) for name in SUPPORTED), ("second-phase", "ddp")]
)
def test_a_killed_run_goes_on_to_the_same_weights(once, cases, case, backend):
    assert_goes_on(once, f"distill-{case}", backend, cases[case])


def test_zero_3_is_refused_before_models_are_loaded(cases, tmp_path):
    prepare("zero3")
    done = launch(BACKENDS["zero3"], tmp_path, cases["one-head"](out=tmp_path / "out"))
    assert done.returncode != 0
    assert "which DeepSpeed ZeRO-3 divides; take ZeRO-2 or FSDP2" in done.stdout, done.stdout[-SHOWN:]
    assert "Loading the teacher" not in done.stdout
    assert not (tmp_path / "out").exists()
