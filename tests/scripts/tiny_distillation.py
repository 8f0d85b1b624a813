"""Students, teachers and data of a few kilobytes for `moekit distill`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from moekit.scripts import cli
from moekit.scripts.staging import partial_folder
from moekit.scripts.train_rows import read_labelled_rows
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    ViTConfig,
    ViTImageProcessor,
)

from .tiny_checkpoints import VOCABULARY, tiny_tokenizer
from .tiny_training import KilledError, kill_after, tiny_bert

QUICK = {"--seq-len": 32, "--steps": 4, "--batch-size": 4, "--logging-steps": 1, "--learning-rate": 0.01}
ALIGNED = ("--loss", "dhkd", "--align-gradients", "--align-smoothing", 0.5)
CLASSIFY = ("--task", "classification")
FOREIGN = 280
"""Tokens of a tokenizer that cuts texts otherwise."""


def words(student: Path, teacher: Path, data: Path, out: Path, *more: object, without: str = "") -> list[str]:
    """Arguments of the command with few and short steps, or without one of the options of `QUICK`."""
    quick = [word for option in QUICK.items() if option[0] != without for word in option]
    given = (student, "--teacher", teacher, "--data", data, "--out", out, *quick, *more)
    return ["distill", *map(str, given)]


def distill(student: Path, teacher: Path, data: Path, out: Path, *more: object, without: str = "") -> int:
    """Run that command."""
    return cli.main(words(student, teacher, data, out, *more, without=without))


def distill_killed(
    monkeypatch, step: int, student: Path, teacher: Path, data: Path, out: Path, *more: object
) -> Path:
    """Run it and let it die after a step.

    Returns:
        The folder of its checkpoints.
    """
    with monkeypatch.context() as patch:
        kill_after(patch, step)
        try:
            distill(student, teacher, data, out, *more)
        except KilledError:
            return partial_folder(out) / "work" / "trainer"
    raise AssertionError(f"the run ended before step {step}")


def record(out: Path) -> dict[str, Any]:
    """What run.json says."""
    return json.loads((out / "run.json").read_text(encoding="utf-8"))


def losses(out: Path, name: str = "loss") -> list[float]:
    """Logged at each step."""
    return [row[name] for row in record(out)["metrics"]["history"] if name in row]


def weights(out: Path) -> dict[str, torch.Tensor]:
    """All tensors of a result."""
    return load_file(out / "model.safetensors")


def changed(one: Path, other: Path) -> list[str]:
    """Names of the tensors in which two results differ."""
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    return sorted(name for name, tensor in mine.items() if not torch.equal(tensor, theirs[name]))


def write_foreign(folder: Path, model: PreTrainedModel) -> Path:
    """A model with the other tokenizer."""
    model.save_pretrained(folder)
    tiny_tokenizer(FOREIGN).save_pretrained(folder)
    return folder


def tiny_judge(rows: Path, labels: Sequence[str], vocabulary: int = VOCABULARY) -> PreTrainedModel:
    """A BERT that has learned which texts have which label."""
    torch.manual_seed(0)
    config = tiny_bert().config
    config.vocab_size = vocabulary
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    model = AutoModelForSequenceClassification.from_config(config)
    examples = read_labelled_rows(str(rows))
    inputs = tiny_tokenizer(vocabulary)([row.text for row in examples], padding=True, return_tensors="pt")
    answers = torch.tensor([config.label2id[row.label] for row in examples])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(15):
        model(**inputs, labels=answers).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def write_pictures(folder: Path) -> Path:
    """Dark and light noise, in a folder for each."""
    rng = np.random.default_rng(0)
    for name, brightness in (("dark", 60), ("light", 190)):
        (folder / name).mkdir(parents=True)
        for number in range(12):
            pixels = rng.integers(brightness - 40, brightness + 40, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def write_vit(folder: Path, size: int, *, has_weights: bool) -> Path:
    """A vision transformer that tells dark from light pictures of some size."""
    sizes = {"patch_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    names = {"id2label": {0: "dark", 1: "light"}, "label2id": {"dark": 0, "light": 1}}
    config = ViTConfig(image_size=size, hidden_size=32, intermediate_size=48, **sizes, **names)  # pyright: ignore
    torch.manual_seed(0)
    made = AutoModelForImageClassification.from_config(config) if has_weights else config
    made.save_pretrained(folder)
    ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(folder)
    return folder
