"""A student with two heads on one backbone: the task's labels for one, the teacher's logits for the other."""

# B batch, S sequence, D feature width, C classes of the task, A classes of the teacher

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..moe.checkpoint import save_checkpoint
from .aligned_features import align
from .auxiliary_head import AuxiliaryHeadSpec, build_auxiliary_head
from .gradient_alignment import GradientAlignment
from .task_head import UnsupportedStudentError, task_head

HEAD_FILE = "auxiliary_head.safetensors"
SPEC_FILE = "dual_head.json"


@dataclass(frozen=True, slots=True)
class DualHeadOutput:
    """What both heads say of one batch."""

    logits: Float[Tensor, "*rows C"]
    """Of the task head, as the plain model gives them: softcapped, scaled, pooled."""
    auxiliary_logits: Float[Tensor, "*rows A"]
    """Of the auxiliary head, treated by the model in the same way."""
    features: Float[Tensor, "*tokens D"]
    """What both heads read."""


class DualHeadStudent(nn.Module):
    """Task head and auxiliary head on the features of one Transformers model.

    The task head learns from the labels alone, the auxiliary one from the teacher's logits alone, the
    backbone from both. The task head is what remains: `export` gives the plain model back.

    Any causal language model, or classifier of sequences, tokens or images, whose task head is one linear map
    (`task_head`). Nothing in the model is replaced: while this module runs, the auxiliary head reads what the
    task head reads, and what the model does to logits (softcap, scale, pooling) happens to both.

    Attributes:
        model: The plain model.
        auxiliary_head: The second head.
        spec: What it looks like.
        num_teacher_classes: A.
        head_name: Module path of the task head in the model.
        num_classes: C.
        alignment: Aligns the two heads' gradients by the features, where gradients are wanted; not a part of
            the state.

    Args:
        model: The student.
        spec: Of the auxiliary head.
        num_teacher_classes: A; by default as many as the student has.

    Raises:
        UnsupportedStudentError: The model has no such head.
        ValueError: The auxiliary head cannot be built.

    Reference: Yang et al., Dual-Head Knowledge Distillation (KDD 2025), arXiv:2411.08937.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        spec: AuxiliaryHeadSpec | None = None,
        *,
        num_teacher_classes: int | None = None,
    ) -> None:
        super().__init__()
        head = task_head(model)
        self.model = model
        self.head_name, self.num_classes = head.name, head.num_classes
        self.spec = AuxiliaryHeadSpec() if spec is None else spec
        self.num_teacher_classes = head.num_classes if num_teacher_classes is None else num_teacher_classes
        self.auxiliary_head = build_auxiliary_head(head, self.spec, self.num_teacher_classes)
        self.alignment: GradientAlignment | None = None
        self.train(model.training)

    @property
    def config(self) -> Any:
        """The plain model's."""
        return self.model.config

    def forward(self, **inputs: Any) -> DualHeadOutput:
        """Run the model once, and both heads on its features.

        Args:
            **inputs: The plain model's, without labels: the losses are the caller's.

        Raises:
            ValueError: Labels are given.
            UnsupportedStudentError: The model's logits do not come from its task head.
        """
        if inputs.get("labels") is not None:
            raise ValueError("labels make the model compute a loss of both heads' logits; leave them out")
        num_classes = self.num_classes
        with self._auxiliary_logits_beside() as heard:
            both = self.model(**inputs).logits
        if len(heard) != 1 or both.shape[-1] != num_classes + self.num_teacher_classes:
            raise UnsupportedStudentError(
                f"{type(self.model).__name__} called its task head {len(heard)} times and returned logits of "
                f"width {both.shape[-1]}, not {num_classes} + {self.num_teacher_classes}"
            )
        logits, auxiliary_logits = both.split([num_classes, self.num_teacher_classes], dim=-1)
        return DualHeadOutput(logits, auxiliary_logits, heard[0])

    @contextmanager
    def _auxiliary_logits_beside(self) -> Iterator[list[Tensor]]:
        """Let the task head return the auxiliary logits behind its own; yields the features it reads."""
        heard: list[Tensor] = []
        for_auxiliary: list[Tensor] = []

        def split(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            features = args[0]
            heard.append(features)
            if self.alignment is None or not features.requires_grad:
                for_auxiliary.append(features)
                return args
            task, distilled = align(features, self.alignment)
            for_auxiliary.append(distilled)
            return (task, *args[1:])

        def widen(module: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> Tensor:
            return torch.cat([logits, self.auxiliary_head(for_auxiliary[-1])], dim=-1)

        head = self.model.get_submodule(self.head_name)
        handles = [head.register_forward_pre_hook(split), head.register_forward_hook(widen)]
        try:
            yield heard
        finally:
            for handle in handles:
                handle.remove()

    def auxiliary_parts(self, features: Float[Tensor, "N D"]) -> tuple[Float[Tensor, "N R"], nn.Linear]:
        """What the last linear map of the auxiliary head reads, and that map, for losses without logits."""
        if isinstance(self.auxiliary_head, nn.Linear):
            return features, self.auxiliary_head
        assert isinstance(self.auxiliary_head, nn.Sequential)
        *trunk, last = self.auxiliary_head
        assert isinstance(last, nn.Linear)
        for module in trunk:
            features = module(features)
        return features, last

    def share_batch_statistics(self) -> None:
        """Let the auxiliary head's BatchNorm, if it has one, take its statistics over all processes."""
        self.auxiliary_head = nn.SyncBatchNorm.convert_sync_batchnorm(self.auxiliary_head)

    def export(self) -> PreTrainedModel:
        """The plain model, which never knew of the auxiliary head."""
        return self.model

    @torch.no_grad()
    def mixed_probabilities(
        self, *, share: float = 0.5, temperature: float = 1.0, **inputs: Any
    ) -> Float[Tensor, "*rows C"]:
        """Let both heads vote: ``a softmax(z) + (1 - a) softmax(z_aux / b)``.

        Args:
            share: a, of the task head.
            temperature: b, of the auxiliary head.
            **inputs: The plain model's.

        Raises:
            ValueError: `share` or `temperature` is out of range, or the heads have different classes.

        Reference: DHO, arXiv:2505.07675, where both are chosen on held-out data. The paper drops the
        auxiliary head.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share={share} is not between 0 and 1")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature={temperature} is not a finite number above 0")
        out = self(**inputs)
        if out.logits.shape != out.auxiliary_logits.shape:
            raise ValueError(
                f"the heads have {out.logits.shape[-1]} and {out.auxiliary_logits.shape[-1]} classes; only "
                "heads with the same classes can be mixed"
            )
        task = out.logits.softmax(-1, dtype=torch.float32)
        return task * share + (out.auxiliary_logits.float() / temperature).softmax(-1) * (1 - share)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the plain model's checkpoint, and the auxiliary head in files of its own beside it.

        The folder also loads as the plain model, with ``from_pretrained``.
        """
        save_checkpoint(self.model, folder)
        self.save_auxiliary_head(folder)

    def save_auxiliary_head(self, folder: str | Path) -> None:
        """Write its files beside a plain model's."""
        tensors = {name: tensor.contiguous() for name, tensor in self.auxiliary_head.state_dict().items()}
        save_file(tensors, Path(folder) / HEAD_FILE)
        entry = {
            "model_class": type(self.model).__name__,
            "num_teacher_classes": self.num_teacher_classes,
            "auxiliary_head": asdict(self.spec),
        }
        text = json.dumps(entry, indent=2) + "\n"
        (Path(folder) / SPEC_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> "DualHeadStudent":
        """Read what `save_pretrained` wrote.

        Args:
            folder: A local folder.
            **kwargs: For the plain model's ``from_pretrained``.

        Raises:
            ValueError: The folder holds no dual-head student, or a damaged one.
        """
        path = Path(folder) / SPEC_FILE
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            model_class: Any = getattr(transformers, entry["model_class"])
            spec, num_classes = AuxiliaryHeadSpec(**entry["auxiliary_head"]), entry["num_teacher_classes"]
            is_model = issubclass(model_class, PreTrainedModel)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"'{folder}' holds no dual-head student ({SPEC_FILE}: {error})") from error
        if not is_model or type(num_classes) is not int or num_classes < 1:
            raise ValueError(f"'{path}' names no model class or number of classes: {entry}")
        model = model_class.from_pretrained(folder, **kwargs)
        student = cls(model, spec, num_teacher_classes=num_classes)
        student.load_auxiliary_head(folder)
        return student

    def load_auxiliary_head(self, folder: str | Path) -> None:
        """Read its weights, in place.

        Raises:
            ValueError: There are none, or those of another head.
        """
        try:
            self.auxiliary_head.load_state_dict(load_file(Path(folder) / HEAD_FILE), strict=True)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"'{Path(folder) / HEAD_FILE}' does not fit its {SPEC_FILE}: {error}") from error
