"""What the benchmarks of dual-head distillation share: arms, their loss, training, and measures of conflict.

Their weights and temperatures are the published ones; no arm was tuned.
"""

# N examples, C classes, D feature width

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
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
from torch.nn.functional import cross_entropy

MEASURE_EVERY = 20
BASE = "labels only"
Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to learn."""

    loss: str | None = None
    """Against the teacher; a name of `LOSSES`."""
    temperature: float = 1.0
    weight: float | None = 1.0
    """Of that loss; None for the published one, which goes by the number of classes."""
    task: float = 1.0
    """Weight of the labels' loss."""
    head: str | None = None
    """The kind of second head."""
    align: str | None = None
    """Where gradients are aligned."""


def _dual(head: str, align: str | None = None) -> Arm:
    return Arm(loss="binary-kl-norm", temperature=2.0, weight=None, head=head, align=align)


ARMS = {
    BASE: Arm(),
    "KL": Arm(loss="kl", temperature=4.0, task=0.1, weight=0.9),
    "DKD": Arm(loss="dkd", temperature=4.0),
    "logit MSE": Arm(loss="mse"),
    "BinaryKL": Arm(loss="binary-kl", temperature=2.0),
    "BinaryKL-Norm": Arm(loss="binary-kl-norm", temperature=2.0, weight=None),
    "dual head, linear": _dual("linear"),
    "dual head, bottleneck": _dual("bottleneck"),
    "dual head, aligned": _dual("linear", "parameters"),
    "dual head, aligned at features": _dual("linear", "features"),
}


def student_of(plain: Any, arm: Arm) -> Any:
    """The model with the second head of the arm, if it has one."""
    return plain if arm.head is None else DualHeadStudent(plain, AuxiliaryHeadSpec(kind=arm.head))


class Objective:
    """The loss of one arm, and the conflict it saw."""

    def __init__(self, arm: Arm, student: Any) -> None:
        self.arm, self.student = arm, student
        self.plain = student if arm.head is None else student.model
        published = published_weight(student.config.num_labels, "sum")
        self.weight = published if arm.weight is None else arm.weight
        self.cosines: dict[str, list[float]] = {"classifier": [], "backbone": []}
        self.factors: list[float] = []

    def __call__(
        self, inputs: Inputs, labels: torch.Tensor, teacher_logits: torch.Tensor, step: int
    ) -> torch.Tensor:
        """The sum to minimise."""
        output = self.student(**inputs)
        task = self.arm.task * cross_entropy(output.logits, labels)
        if self.arm.loss is None:
            return task
        method = LOSSES[self.arm.loss]
        logits = output.logits if self.arm.head is None else output.auxiliary_logits
        labelled = {"labels_N": labels} if method.needs_labels else {}
        rows = method.function(logits, teacher_logits, temperature=self.arm.temperature, **labelled)
        distilled = self.weight * rows.mean()
        if step % MEASURE_EVERY == 0:
            self._measure(task, distilled)
        return self._factor(task, distilled, output) * task + distilled

    def _factor(self, task: torch.Tensor, distilled: torch.Tensor, output: Any) -> float | torch.Tensor:
        if self.arm.align is None:
            return 1.0
        if self.arm.align == "parameters":
            found = parameter_products(task, distilled, list(self.student.parameters()))
        else:
            found = feature_products(task, distilled, output.features)
        factor = alignment_factor(*found)
        self.factors.append(float(factor))
        return factor

    def _measure(self, task: torch.Tensor, distilled: torch.Tensor) -> None:
        places = {"backbone": [p for p in self.plain.base_model.parameters() if p.requires_grad]}
        if self.arm.head is None:
            places["classifier"] = [task_head(self.plain).linear.weight]
        for where, parameters in places.items():
            cosine = gradient_cosine(task, distilled, parameters)
            # Where every label is certain, its gradient is 0 and has no direction.
            if math.isfinite(cosine):
                self.cosines[where].append(cosine)

    def mean_cosines(self, last: float = 1.0) -> dict[str, float]:
        """Of the two losses' gradients, over the last share of the measurements."""
        return {
            where: fmean(found[-math.ceil(last * len(found)) :])
            for where, found in self.cosines.items()
            if found
        }

    @property
    def mean_factor(self) -> float:
        """Of the labels' loss, by alignment."""
        return fmean(self.factors) if self.factors else 1.0


def fit(
    model: Any,
    optimizer: torch.optim.Optimizer,
    batches: list[torch.Tensor],
    objective: Callable[[torch.Tensor, int], torch.Tensor],
) -> None:
    """Minimise ``objective(rows, step)`` over the batches, the learning rate falling as a cosine."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    model.train()
    for step, rows in enumerate(batches):
        objective(rows, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


@torch.no_grad()
def logits_and_features(plain: Any, batches: Iterable[Inputs]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the task head says, and what it reads, of all batches."""
    features: list[torch.Tensor] = []
    handle = task_head(plain).linear.register_forward_hook(lambda _, args, __: features.append(args[0]))
    try:
        logits = torch.cat([plain(**inputs).logits for inputs in batches])
    finally:
        handle.remove()
    return logits, torch.cat(features)


def accuracy(logits_NC: torch.Tensor, labels_N: torch.Tensor) -> float:
    """Share of the right ones."""
    return float((logits_NC.argmax(-1) == labels_N).float().mean())


def collapse(plain: Any, features_ND: torch.Tensor, labels_N: torch.Tensor) -> dict[str, float]:
    """Of the task head and what it reads."""
    return asdict(neural_collapse(features_ND, labels_N, task_head(plain).linear.weight))
