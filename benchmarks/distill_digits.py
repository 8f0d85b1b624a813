"""One head or two: distilling a ViT into a smaller one on scikit-learn's digits.

    pip install scikit-learn
    python benchmarks/distill_digits.py

Every arm of a seed has the same teacher, split, initial student, order of batches and number of steps.
Beside the accuracy of the task head it measures what the dual-head paper argues with: the cosine between the
gradients of the two losses, in the classifier and in the backbone, over the whole training, and how far
features and classifier have collapsed at its end. One JSON line per arm and seed; lines that are there are
not run again. `distill_report.py` makes the table and the figure.
"""

# N images, C classes

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from arms import run_missing
from distill_arms import ARMS, Objective, accuracy, collapse, fit, logits_and_features, student_of
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTForImageClassification

CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class DigitsConfig:
    """Train teachers and students on 8 x 8 digits."""

    seeds: tuple[int, ...] = tuple(range(5))
    arms: tuple[str, ...] = tuple(ARMS)
    epochs: int = 100
    teacher_epochs: int = 100
    batch_size: int = 64
    learning_rate: float = 2e-3
    test_images: int = 597
    results: Path = Path("benchmarks/results/distill_digits.jsonl")
    threads: int = 1


def vit(width: int, layers: int, seed: int) -> ViTForImageClassification:
    """A vision transformer of 16 patches."""
    torch.manual_seed(seed)
    settings = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=CLASSES,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 8,
        intermediate_size=2 * width,
        hidden_dropout_prob=0.0,
    )
    return ViTForImageClassification(settings)


@dataclass(frozen=True)
class Digits:
    """Pictures and labels, dealt anew for each seed."""

    train: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def load(cls, test_images: int, seed: int) -> "Digits":
        """All 1,797."""
        found: Any = load_digits()
        pictures = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
        labels = torch.tensor(found.target)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        test, train = order[:test_images], order[test_images:]
        return cls((pictures[train], labels[train]), (pictures[test], labels[test]))


def train(model: Any, digits: Digits, epochs: int, config: DigitsConfig, seed: int, objective: Any) -> None:
    """Minimise ``objective(inputs, labels, step)`` with AdamW."""
    pictures, labels = digits.train
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=generator)
        batches += order[: len(order) // config.batch_size * config.batch_size].split(config.batch_size)

    def loss(rows: torch.Tensor, step: int) -> torch.Tensor:
        return objective({"pixel_values": pictures[rows]}, labels[rows], step)

    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.05)
    fit(model, optimizer, batches, loss)


def taught(digits: Digits, config: DigitsConfig, seed: int) -> ViTForImageClassification:
    """A teacher."""
    teacher = vit(64, 3, seed)

    def objective(inputs: dict[str, torch.Tensor], labels: torch.Tensor, _: int) -> torch.Tensor:
        return cross_entropy(teacher(**inputs).logits, labels)

    train(teacher, digits, config.teacher_epochs, config, seed, objective)
    return teacher.requires_grad_(requires_grad=False)


def run(name: str, seed: int, config: DigitsConfig, teachers: dict[int, Any]) -> dict[str, Any]:
    """Train one student."""
    digits = Digits.load(config.test_images, seed)
    if seed not in teachers:
        teacher = taught(digits, config, seed)
        teachers.clear()
        teachers[seed] = teacher
    teacher, arm = teachers[seed], ARMS[name]
    plain = vit(16, 2, seed + 1000)
    student = student_of(plain, arm)
    objective = Objective(arm, student)

    def distilled(inputs: dict[str, torch.Tensor], labels: torch.Tensor, step: int) -> torch.Tensor:
        return objective(inputs, labels, teacher(**inputs).logits, step)

    train(student, digits, config.epochs, config, seed, distilled)
    pictures, labels = digits.test
    logits, _ = logits_and_features(plain, [{"pixel_values": pictures}])
    teacher_logits, _ = logits_and_features(teacher, [{"pixel_values": pictures}])
    _, features = logits_and_features(plain, [{"pixel_values": digits.train[0]}])
    return {
        "arm": name,
        "seed": seed,
        "accuracy": accuracy(logits, labels),
        "teacher": accuracy(teacher_logits, labels),
        "cosines": objective.mean_cosines(),
        "factor": objective.mean_factor,
        "collapse": collapse(plain, features, digits.train[1]),
    }


def main(config: DigitsConfig) -> None:
    """Run what is missing."""
    torch.set_num_threads(config.threads)
    wanted = ((arm, seed) for seed in config.seeds for arm in config.arms)
    run_missing(config.results, ("arm", "seed"), wanted, partial(run, config=config, teachers={}))


if __name__ == "__main__":
    main(tyro.cli(DigitsConfig))
