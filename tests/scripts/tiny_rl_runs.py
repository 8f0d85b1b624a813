"""Prompts, rewards and runs of a few steps for `moekit rl`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from moekit.rl import PolicyTrainer, RunState
from moekit.scripts import cli, rl_record
from moekit.scripts.staging import partial_folder
from safetensors.torch import load_file

from .tiny_training import KilledError

QUICK: dict[str, object] = {
    "--steps": 3,
    "--prompts-per-step": 2,
    "--num-generations": 4,
    "--max-completion-length": 5,
    "--learning-rate": 0.01,
    "--eval-prompts": 2,
    "--eval-generations": 2,
    "--save-steps": 1,
}
REWARDS = '''
import math

def vowels(completions, **_):
    """Share of the vowels."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in texts]

def short(completion_ids, **_):
    return [-float(len(ids)) for ids in completion_ids]

def fails(completions, **_):
    if len(completions) > 1 or "e" in completions[0]:
        raise RuntimeError("no e, please")
    return [float(len(completions[0]))]

def unknown(completions, **_):
    return [math.nan if index % 2 else 1.0 for index, _ in enumerate(completions)]

def wanting(completions, difficulty, **_):
    return [0.0] * len(completions)

def too_few(completions, **_):
    return [0.0]
'''
"""A file of a user's."""
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def prompt_rows(count: int = 24) -> list[dict[str, Any]]:
    """Sums, their answers, and how one would write them."""
    pairs = [(number % 5, number % 7) for number in range(count)]
    return [
        {"prompt": f"Q: {a} + {b}\nA:", "answer": str(a + b), "demonstration": f" {a + b}", "left": a}
        for a, b in pairs
    ]


def write_json_lines(path: Path, rows: Sequence[Any]) -> Path:
    """One row a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_rewards(folder: Path) -> Path:
    """The user's file."""
    path = folder / "my_rewards.py"
    path.write_text(REWARDS, encoding="utf-8")
    return path


def words(policy: object, data: object, out: Path, *more: object, without: Sequence[str] = ()) -> list[str]:
    """Arguments of the command with few and short steps, or without some of the options of `QUICK`."""
    quick = [word for option in QUICK.items() if option[0] not in without for word in option]
    return ["rl", *map(str, (policy, "--data", data, "--out", out, *quick, *more))]


def rl(policy: object, data: object, out: Path, *more: object, without: Sequence[str] = ()) -> int:
    """Run that command."""
    return fresh(words(policy, data, out, *more, without=without))


def fresh(arguments: Sequence[str]) -> int:
    """Run a command as if it had the process for itself."""
    AcceleratorState._reset_state()
    return cli.main(arguments)


def skip_pictures(patch: Any) -> None:
    """Leave the report out, whose pictures take most of the time of a run."""
    patch.setattr(rl_record, "write_rl_report", lambda folder, **_: (folder / "report.html").touch())


def rl_killed(monkeypatch: Any, step: int, policy: object, data: object, out: Path, *more: object) -> Path:
    """Run it and let it die after the updates of a step, before anything of that step is kept.

    Returns:
        The folder of its checkpoints.
    """
    row = PolicyTrainer._row

    def die(self: PolicyTrainer, *given: Any) -> Any:
        if self.state.step == step:
            raise KilledError
        return row(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(PolicyTrainer, "_row", die)
        try:
            rl(policy, data, out, *more)
        except KilledError:
            return partial_folder(out) / "work" / "rl"
    raise AssertionError(f"the run ended before step {step}")


def record(out: Path) -> dict[str, Any]:
    """What run.json says."""
    return json.loads((out / "run.json").read_text(encoding="utf-8"))


def history(out: Path) -> list[dict[str, Any]]:
    """Rows of the training without what depends on the machine's day."""
    rows = record(out)["metrics"]["history"]
    timed = ("time/", "completions_per_second")
    return [{name: v for name, v in row.items() if not name.startswith(timed)} for row in rows]


def weights(out: Path) -> dict[str, torch.Tensor]:
    """All tensors of a result."""
    return load_file(out / "model.safetensors")


def changed(one: Path, other: Path) -> list[str]:
    """Names of the tensors in which two results differ."""
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    return sorted(
        name for name, tensor in mine.items() if not torch.equal(tensor, theirs[name].to(tensor.dtype))
    )


def steps_done(folder: Path) -> list[int]:
    """Of the checkpoints that a run has left."""
    states = [RunState(**json.loads(path.read_text())) for path in folder.glob("step-*/policy_state.json")]
    return sorted(state.step for state in states)
