"""`moekit rl` on two processes, with CPUs and gloo: the same as on one, and the same after a kill."""

import copy
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
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
ROUNDING, WEIGHT_ROUNDING = 1e-5, 1e-4
"""Of metrics; and of weights, where Adam divides small differences of small gradients by small numbers."""


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
    """One of `BACKENDS`, for the policy's layers and with other settings of DeepSpeed."""
    found = BACKENDS[name]
    config = copy.deepcopy(found.config)
    if config is not None and "fsdp_config" in config:
        config["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"] = "Qwen3MoeDecoderLayer"
    if deepspeed:
        assert config is not None
        config["deepspeed_config"] |= deepspeed
    return replace(found, config=config)


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
        assert mine == pytest.approx(theirs, rel=0, abs=0 if is_exact else ROUNDING)
        for name in ("reward", "completions/mean_length", "eval_reward"):
            assert mine.get(name) == theirs.get(name)
    weights, expected = (load_file(path / "model.safetensors") for path in (out, other))
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        tolerance = 0 if is_exact else WEIGHT_ROUNDING
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=tolerance)


def assert_worked_together(folder: Path, backend: Backend, *, updates: int | None = 2) -> None:
    """What the processes noted: that they knew of each other, had other prompts, and kept the weights in step."""
    ranks = notes(folder)
    size = run_file(folder / "out")["training"]["parameters"]
    for rank in ranks:
        wanted = {"kind": backend.kind, "world": 2, "backend": "gloo"}
        wanted |= {"zero_stage": backend.zero_stage, "fsdp_version": backend.fsdp_version}
        assert {name: rank[name] for name in wanted} == wanted
        held = rank["local_parameters"] / size
        assert held == pytest.approx(0.5, abs=0.02) if backend.is_divided else held == 1
    for first, second in zip(*(rank["steps"] for rank in ranks), strict=True):
        assert first["step"] == second["step"]
        assert len({*first["prompts"], *second["prompts"]}) == len(first["prompts"]) * 2
        if updates is not None:
            assert first["updates"] == second["updates"] == updates
        if not backend.is_divided:
            assert first["weights"] == second["weights"]
    changed = {step["weights"] for step in ranks[0]["steps"]}
    assert len(changed) == len(ranks[0]["steps"])
    assert run_file(folder / "out")["training"]["processes"] == 2


def assert_loads(out: Path, start: Path) -> None:
    """Every weight is found again, and some have been trained."""
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, dtype=torch.float32)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32).state_dict()
    moved = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert any("experts" in name for name in moved)
    assert any("gate.weight" in name for name in moved)


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
DPH_RL = {"algorithm": "dph-rl", "pass_at": 0.6, "rehearsal_threshold": 0.6, "micro_batch_size": 3}
"""Processes have not as many rehearsal samples each when they are found."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backend", "options", "deepspeed"),
    [
        ("epo", "fsdp2", EPO, {}),
        ("epo", "zero2", EPO, {"gradient_accumulation_steps": 2}),
        ("dapo", "ddp", DAPO, {}),
        ("dph-rl", "zero3", DPH_RL, {}),
    ],
)
def test_what_methods_need_of_all_processes(once, policies, command, name, backend, options, deepspeed):
    make = partial(command, steps=SAVED_AT, **options)
    folder = together(once, name, backend, make, **deepspeed)
    assert_worked_together(folder, backend_of(backend))
    assert_same(folder / "out", alone(once, name, make))
    assert_loads(folder / "out", policies / options.get("policy", "stock"))


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
    monkeypatch.setenv("WORLD_SIZE", "2")
    accelerator: Any = SimpleNamespace(num_processes=processes, distributed_type=kind)
    with pytest.raises(ValueError, match=f"2 processes were started and accelerate knows of {processes}"):
        check_processes(accelerator)
