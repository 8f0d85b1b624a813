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

import copy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import tyro
from arms import run_missing
from moekit.distill import (
    AuxiliaryHeadSpec,
    DualHeadStudent,
    alignment_factor,
    feature_products,
    parameter_products,
    task_head,
)
from moekit.distill.losses import LOSSES, published_weight
from moekit.distill.neural_collapse import gradient_cosine, neural_collapse
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTForImageClassification

CLASSES = 10
ALPHA = published_weight(CLASSES, "sum")
ARMS: dict[str, dict[str, Any]] = {
    "labels only": {},
    "KL": {"loss": "kl", "temperature": 4.0, "task": 0.1, "weight": 0.9},
    "DKD": {"loss": "dkd", "temperature": 4.0},
    "logit MSE": {"loss": "mse", "temperature": 1.0},
    "BinaryKL": {"loss": "binary-kl", "temperature": 2.0},
    "BinaryKL-Norm": {"loss": "binary-kl-norm", "temperature": 2.0, "weight": ALPHA},
    "dual head, linear": {"loss": "binary-kl-norm", "temperature": 2.0, "weight": ALPHA, "head": "linear"},
    "dual head, bottleneck": {
        "loss": "binary-kl-norm",
        "temperature": 2.0,
        "weight": ALPHA,
        "head": "bottleneck",
    },
    "dual head, aligned": {
        "loss": "binary-kl-norm",
        "temperature": 2.0,
        "weight": ALPHA,
        "head": "linear",
        "align": "parameters",
    },
    "dual head, aligned at features": {
        "loss": "binary-kl-norm",
        "temperature": 2.0,
        "weight": ALPHA,
        "head": "linear",
        "align": "features",
    },
}
"""Loss, its temperature and weight, the labels' weight (1), the second head (none), and the alignment."""


@dataclass(frozen=True, kw_only=True)
class DigitsConfig:
    """Train teachers and students on 8 x 8 digits."""

    seeds: tuple[int, ...] = tuple(range(10))
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


def fit(model: Any, digits: Digits, epochs: int, config: DigitsConfig, seed: int, objective: Any) -> None:
    """Minimise ``objective(pictures, labels, step)`` with AdamW and a cosine."""
    pictures, labels = digits.train
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.05)
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * (len(labels) // config.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    step = 0
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=generator)
        for rows in order[: len(order) // config.batch_size * config.batch_size].split(config.batch_size):
            objective(pictures[rows], labels[rows], step).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            step += 1
    model.eval()


@torch.no_grad()
def accuracy(model: Any, part: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Of the task head."""
    return float((model(pixel_values=part[0]).logits.argmax(-1) == part[1]).float().mean())


class Objective:
    """The loss of one arm, and the conflict it saw."""

    def __init__(self, arm: dict[str, Any], student: Any, teacher: Any) -> None:
        self.arm, self.student, self.teacher = arm, student, teacher
        self.cosines: dict[str, list[float]] = {"classifier": [], "backbone": []}
        self.factors: list[float] = []

    def __call__(self, pictures: torch.Tensor, labels: torch.Tensor, step: int) -> torch.Tensor:
        """The sum to minimise."""
        output = self.student(pixel_values=pictures)
        task = self.arm.get("task", 1.0) * cross_entropy(output.logits, labels)
        if "loss" not in self.arm:
            return task
        with torch.no_grad():
            teacher_logits = self.teacher(pixel_values=pictures).logits
        method = LOSSES[self.arm["loss"]]
        logits = output.auxiliary_logits if "head" in self.arm else output.logits
        labelled = {"labels_N": labels} if method.needs_labels else {}
        rows = method.function(logits, teacher_logits, temperature=self.arm["temperature"], **labelled)
        distilled = self.arm.get("weight", 1.0) * rows.mean()
        if step % 20 == 0:
            self._measure(task, distilled)
        return self._factor(task, distilled, output) * task + distilled

    def _factor(self, task: torch.Tensor, distilled: torch.Tensor, output: Any) -> float | torch.Tensor:
        where = self.arm.get("align")
        if where is None:
            return 1.0
        if where == "parameters":
            found = parameter_products(task, distilled, list(self.student.parameters()))
        else:
            found = feature_products(task, distilled, output.features)
        factor = alignment_factor(*found)
        self.factors.append(float(factor))
        return factor

    def _measure(self, task: torch.Tensor, distilled: torch.Tensor) -> None:
        plain = self.student.model if "head" in self.arm else self.student
        backbone = [p for p in plain.base_model.parameters() if p.requires_grad]
        self.cosines["backbone"].append(gradient_cosine(task, distilled, backbone))
        if "head" not in self.arm:
            weight = task_head(plain).linear.weight
            self.cosines["classifier"].append(gradient_cosine(task, distilled, [weight]))


def collapse(plain: Any, part: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    """Of the task head on training images."""
    head = task_head(plain).linear
    with torch.no_grad():
        features = plain.vit(part[0]).last_hidden_state[:, 0]
    return asdict(neural_collapse(features, part[1], head.weight))


def run(name: str, seed: int, config: DigitsConfig, teachers: dict[int, Any]) -> dict[str, Any]:
    """Train one student."""
    digits = Digits.load(config.test_images, seed)
    if seed not in teachers:
        teacher = vit(64, 3, seed)
        plain = Objective({}, teacher, None)
        fit(teacher, digits, config.teacher_epochs, config, seed, plain)
        teachers.clear()
        teachers[seed] = teacher
    teacher, arm = teachers[seed], ARMS[name]
    student: Any = vit(16, 2, seed + 1000)
    if "head" in arm:
        student = DualHeadStudent(student, AuxiliaryHeadSpec(kind=arm["head"]))
    objective = Objective(arm, student, copy.deepcopy(teacher).eval())
    fit(student, digits, config.epochs, config, seed, objective)
    exported = student.export() if "head" in arm else student
    return {
        "arm": name,
        "seed": seed,
        "accuracy": accuracy(exported, digits.test),
        "teacher": accuracy(teacher, digits.test),
        "cosines": {where: fmean(found) for where, found in objective.cosines.items() if found},
        "factor": fmean(objective.factors) if objective.factors else 1.0,
        "collapse": collapse(exported, digits.train),
    }


def main(config: DigitsConfig) -> None:
    """Run what is missing."""
    torch.set_num_threads(config.threads)
    wanted = ((arm, seed) for seed in config.seeds for arm in config.arms)
    run_missing(config.results, ("arm", "seed"), wanted, partial(run, config=config, teachers={}))


if __name__ == "__main__":
    main(tyro.cli(DigitsConfig))
