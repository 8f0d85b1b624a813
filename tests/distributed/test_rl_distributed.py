"""`moekit rl` on two processes, with CPUs and gloo: the same as on one, and the same after a kill."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from moekit.rl.processes import check_processes
from moekit.scripts import cli
from moekit.scripts.staging import partial_folder
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ..scripts.tiny_checkpoints import TEXT_OPTIONS, tiny_rows, write_checkpoint, write_data
from .conftest import Once
from .launch import BACKENDS, REFUSED, SHOWN, Backend, launch
from .rl_worker import KILLED, KILLED_AT
from .runs import Words, notes, prepare, run_file, words

WORKER = Path(__file__).with_name("rl_worker.py")
STEPS, SAVED_AT, PROMPTS, GROUP = 4, 2, 4, 4
LOOP = {
    "steps": STEPS,
    "save_steps": SAVED_AT,
    "eval_steps": SAVED_AT,
    "prompts_per_step": PROMPTS,
    "num_generations": GROUP,
    "mini_batches": 2,
    "micro_batch_size": 2,  # several of them in a mini-batch, of two processes too
    "max_completion_length": 8,
    "eval_prompts": 3,
    "eval_generations": 2,
    "learning_rate": 3e-3,
    "weight_decay": 0.1,
}
KL_COV = {"algorithm": "kl-cov", "set": ("share=0.05", "kl_weight=5"), "beta": 0.05, "entropy_coef": 0.01}
REWARD = """
def even(completion_ids, **_):
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]
"""
"""Differs between the completions of a random model."""
CLOCK = ("time/", "completions_per_second")
ROUNDING, WEIGHT_ROUNDING = 2e-5, 3e-4
"""Of metrics; and of weights, a tenth of a step: Adam makes much of differences of small gradients."""


@pytest.fixture(scope="session")
def policies(once) -> Path:
    """A random MoE, the same with half its experts, prompts and a reward."""

    def fill(folder: Path) -> None:
        write_checkpoint(folder / "stock")
        data = write_data(folder / "text.jsonl")
        compress = ["compress", folder / "stock", "--data", data, *TEXT_OPTIONS, "--experts", "4"]
        assert cli.main([*map(str, compress), "--out", str(folder / "compressed")]) == 0
        sums = [row["text"] for row in tiny_rows() if row["domain"] == "sums"][:40]
        rows = [json.dumps({"prompt": text[: text.index("A:") + 2]}) + "\n" for text in sums]
        (folder / "prompts.jsonl").write_text("".join(rows), encoding="utf-8")
        (folder / "reward.py").write_text(REWARD, encoding="utf-8")

    return once("policies", fill)


@pytest.fixture(scope="session")
def command(policies) -> Words:
    """Makes a command; a tuple is several words of one option."""

    def make(policy: str = "stock", **changes: object) -> list[str]:
        given = {"data": policies / "prompts.jsonl", "reward": f"{policies / 'reward.py'}:even"}
        options = LOOP | given | changes
        several = {name: value for name, value in options.items() if isinstance(value, tuple)}
        found = words("rl", policies / policy, {n: v for n, v in options.items() if n not in several})
        for name, values in several.items():
            found += ["--" + name.replace("_", "-"), *map(str, values)]
        return found

    return make


def backend_of(name: str, **deepspeed: object) -> Backend:
    """One of `BACKENDS`, with other settings of DeepSpeed."""
    found = BACKENDS[name]
    if not deepspeed:
        return found
    assert found.config is not None
    settings = found.config["deepspeed_config"] | deepspeed
    return replace(found, config=found.config | {"deepspeed_config": settings})


def alone(once: Once, name: str, make: Words) -> Path:
    """The result of one process."""

    def fill(folder: Path) -> None:
        assert cli.main(make(out=folder / "out")) == 0

    return once(f"rl-{name}-alone", fill) / "out"


def together(once: Once, name: str, backend: str, make: Words, **deepspeed: object) -> Path:
    """The folder of a finished run on two processes: result, notes, and the hidden folder as if killed."""
    prepare(backend)
    how = backend_of(backend, **deepspeed)
    return once(f"rl-{name}-{backend}", lambda folder: start(how, folder, make(out=folder / "out")))


def start(backend: Backend, folder: Path, command: list[str]) -> None:
    done = launch(backend, folder, command, WORKER)
    assert done.returncode == 0, done.stdout[-SHOWN:]


def history(out: Path) -> list[dict[str, Any]]:
    """Metrics of every step, without those of the clock."""
    rows = run_file(out)["metrics"]["history"]
    return [{name: value for name, value in row.items() if not name.startswith(CLOCK)} for row in rows]


def assert_same(out: Path, other: Path, *, is_exact: bool = False) -> None:
    """Metrics of every step and weights; rewards and lengths to the last bit, as are completions."""
    rows, others = history(out), history(other)
    assert len(rows) == len(others)
    for mine, theirs in zip(rows, others, strict=True):
        assert mine == pytest.approx(theirs, rel=0 if is_exact else ROUNDING, abs=0 if is_exact else ROUNDING)
        for name in ("reward", "completions/mean_length", "eval_reward"):
            assert mine.get(name) == theirs.get(name)
    weights, expected = (load_file(path / "model.safetensors") for path in (out, other))
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        tolerance = 0 if is_exact else WEIGHT_ROUNDING
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=tolerance)


def assert_worked_together(folder: Path, backend: Backend) -> None:
    """What the processes noted: they knew of each other, had other prompts, and kept the weights in step."""
    ranks = notes(folder)
    held = [rank["local_parameters"] / rank["parameters"] for rank in ranks]
    if backend.is_divided:
        assert sum(held) == pytest.approx(1, abs=0.02)
        assert max(held) < 0.6  # an odd number of experts has no half
    else:
        assert held == [1, 1]
    for rank in ranks:
        wanted = {"kind": backend.kind, "world": 2, "backend": "gloo"}
        wanted |= {"zero_stage": backend.zero_stage, "fsdp_version": backend.fsdp_version}
        assert {name: rank[name] for name in wanted} == wanted
    for first, second in zip(*(rank["steps"] for rank in ranks), strict=True):
        assert first["step"] == second["step"]
        assert len({*first["prompts"], *second["prompts"]}) == PROMPTS
    # Of the last round of sampling in each step.
    learned = [[step for step in rank["steps"] if "updates" in step] for rank in ranks]
    training = run_file(folder / "out")["training"]
    assert len({step["weights"] for step in learned[0]}) == training["steps"]
    for first, second in zip(*learned, strict=True):
        assert first["updates"] == second["updates"] == LOOP["mini_batches"]
        if not backend.is_divided:
            assert first["weights"] == second["weights"]
    assert training["processes"] == 2


def assert_loads(out: Path, start: Path, trained: tuple[str, ...] = ("experts", "gate.weight")) -> None:
    """Every weight is found again, and those with such names have been trained."""
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, dtype=torch.float32)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32).state_dict()
    moved = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    for part in trained:
        assert any(part in name for name in moved)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_processes_learn_as_one(once, policies, command, backend):
    make = partial(command, **KL_COV)
    folder = together(once, "kl-cov", backend, make)
    assert_worked_together(folder, backend_of(backend))
    assert_same(folder / "out", alone(once, "kl-cov", make))
    assert_loads(folder / "out", policies / "stock")


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_killed_run_goes_on_to_the_same_weights(once, command, backend):
    make = partial(command, **KL_COV)
    whole = together(once, "kl-cov", backend, make)
    folder = once(f"rl-kl-cov-{backend}-resumed", lambda folder: None)
    shutil.copytree(partial_folder(whole / KILLED), partial_folder(folder / "out"))
    start(backend_of(backend), folder, make(out=folder / "out"))
    for rank, before in zip(notes(folder), notes(whole), strict=True):
        assert rank["steps"] == before["steps"][SAVED_AT:]
    assert SAVED_AT < KILLED_AT < STEPS
    assert_same(folder / "out", whole / "out", is_exact=True)


EPO = {
    "algorithm": "epo",
    "policy": "compressed",
    "set": ("kappa_low=0.9", "kappa_high=1.0"),
    "eval_prompts": 1,
}
"""With held-out prompts for one process only."""
DAPO = {"algorithm": "dapo", "num_generations": 2, "max_completion_length": 2, "router_replay": True}
"""Of two completions that short some groups earn the same."""
DPH_RL = {
    "algorithm": "dph-rl",
    "rehearsal_threshold": 0.75,
    "rehearsal_share": 0.25,  # of 16 completions: as many for each mini-batch of each process
    "micro_batch_size": 3,
}
"""With rehearsal samples of which the processes find not as many each."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "options", "deepspeed", "shown"),
    [
        ("fsdp2", EPO, {}, "regularizer_loss"),
        ("zero2", EPO, {"gradient_accumulation_steps": 2}, "regularizer_loss"),
        ("ddp", DAPO, {}, "sampling/rounds"),
        ("zero3", DPH_RL, {}, "rehearsal/divergence"),
    ],
)
def test_what_methods_need_of_all_processes(once, policies, command, backend, options, deepspeed, shown):
    name, make = options["algorithm"], partial(command, steps=SAVED_AT, **options)
    folder = together(once, name, backend, make, **deepspeed)
    assert_worked_together(folder, backend_of(backend))
    assert history(folder / "out")[-1][shown]
    assert_same(folder / "out", alone(once, name, make))
    assert_loads(folder / "out", policies / options.get("policy", "stock"))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fsdp2", "zero3"])
def test_adapters_are_merged_where_weights_are_in_parts(once, policies, command, backend):
    make = partial(command, steps=SAVED_AT, eval_prompts=0, lora=4, beta=0.05, learning_rate=3e-2)
    folder = together(once, "lora", backend, make)
    assert_worked_together(folder, backend_of(backend))
    assert_same(folder / "out", alone(once, "lora", make))
    assert_loads(folder / "out", policies / "stock", trained=("q_proj",))
    assert (folder / "out" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("message", REFUSED)
def test_what_would_silently_not_be_distributed_is_refused(command, tmp_path, message):
    if REFUSED[message].kind == "DEEPSPEED":
        prepare("zero")
    done = launch(REFUSED[message], tmp_path, command(out=tmp_path / "out"), WORKER)
    assert done.returncode != 0
    assert message in done.stdout, done.stdout[-SHOWN:]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("processes", "kind"), [(2, DistributedType.NO), (1, DistributedType.DEEPSPEED), (1, DistributedType.NO)]
)
def test_processes_that_know_nothing_of_each_other(monkeypatch, processes, kind):
    class Launched(Accelerator):
        """Of processes that are not there."""

        num_processes = processes
        distributed_type = kind

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=f"2 processes were started and accelerate knows of {processes}"):
        check_processes(Launched.__new__(Launched))
