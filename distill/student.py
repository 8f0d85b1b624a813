"""What is trained: a student together with its losses."""

# B batch, S sequence, N rows that count, D feature width, C classes

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..moe import expert_layers
from ..moe.expert_load import collect_expert_load
from ..moe.wrapping import WrapsModel
from .aligned_features import align
from .dual_head import DualHeadStudent
from .fused import TeacherStates, cross_entropy, cross_entropy_plus, fused_loss
from .gradient_alignment import GradientAlignment, parameter_products
from .head_losses import NumItems, cross_entropy_mean, distillation_loss, label_measures
from .language_head import LogitScale, hidden_states, logit_scale, scaled_head
from .losses import ValidRows
from .recipe import DistillationRecipe
from .task_head import task_head
from .teachers import Said, TopK


class StudentInTraining(WrapsModel):
    """A student whose forward gives losses, made where its weights are whole whatever shards them.

    A language model's logits are never made but in tiles, of the rows that count.

    Attributes:
        student: The plain model, or both heads.
        recipe: Which losses.
        alignment: Of the two heads' gradients.
        head: The task head.
        scale: What becomes of a language model's logits; ``None`` for classifiers.
        num_columns: Tokens that student and teacher share, where the heads are padded.

    Args:
        student: With two heads if the recipe says so.
        recipe: Which losses.
        alignment: For two heads; none by default.
        num_columns: See above.

    Raises:
        ValueError: Heads that are not the recipe's, or an alignment of one head.
        UnsupportedStudentError: The student's head cannot be read.
        UnsupportedModelError: The recipe balances experts, and the student has none.
    """

    accepts_loss_kwargs = True
    """For Trainer."""

    def __init__(
        self,
        student: PreTrainedModel | DualHeadStudent,
        recipe: DistillationRecipe,
        *,
        alignment: GradientAlignment | None = None,
        num_columns: int | None = None,
    ) -> None:
        super().__init__()
        has_two = isinstance(student, DualHeadStudent)
        if has_two != (recipe.heads == "dual"):
            raise ValueError(
                f"the recipe is for heads={recipe.heads!r} and the student is a {type(student).__name__}; "
                "wrap it in DualHeadStudent for 'dual', or give the plain model for 'single'"
            )
        if alignment is not None and not has_two:
            raise ValueError("gradients are aligned between two heads; take heads='dual', or no alignment")
        self.student, self.recipe, self.alignment = student, recipe, alignment
        self.num_columns = num_columns
        plain = self.plain
        # Found once: both look through all modules of the model.
        self.head = task_head(plain)
        self.layers = expert_layers(plain) if recipe.load_balance else []
        self.scale: LogitScale | None = None
        if plain.get_output_embeddings() is not None:
            self.scale = logit_scale(plain)
        self.train(student.training)

    @property
    def plain(self) -> PreTrainedModel:
        """The student without its second head."""
        return self.student.export() if isinstance(self.student, DualHeadStudent) else self.student

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recompute the plain model's activations."""
        self.plain.activation_checkpointing_enable(**options)

    def drop_auxiliary_head(self) -> None:
        """Go on with the task head alone."""
        self.student, self.alignment = self.plain, None

    def forward(
        self,
        inputs: dict[str, Any],
        *,
        labels: Int[Tensor, " N"] | None = None,
        rows: ValidRows | None = None,
        said: Said | None = None,
        num_items: NumItems | None = None,
        taught: ValidRows | None = None,
        num_taught: NumItems | None = None,
    ) -> dict[str, Tensor]:
        """Compute the losses; or, if there are no labels, how the plain model does.

        Args:
            inputs: The plain model's.
            labels: Of the rows that count.
            rows: Where they are; ``None`` where each example is one.
            said: What the teacher says of them; without it the labels' loss is all.
            num_items: What the labels' sum over rows is divided by; their number by default.
            taught: Those of a language model's rows that `said` is about; all by default.
            num_taught: What their sum is divided by, given `taught`; their number by default.

        Returns:
            ``loss``, and ``task`` and ``distillation`` where they were computed apart, all weighted. Without
            labels a language model's ``measures`` of `rows`, see `label_measures`; otherwise ``logits``.
        """
        if labels is None:
            return self._unlabelled(inputs, rows)
        with self._expert_load(inputs) as load:
            parts = (
                self._language_losses(inputs, rows, said, num_items, taught, num_taught)
                if self.scale is not None and rows is not None
                else self._class_losses(inputs, labels, rows, said, num_items)
            )
        if "loss" not in parts:
            parts["loss"] = self._total(parts)
        if load is not None:
            parts["expert_load"] = load()
        return parts

    def _unlabelled(self, inputs: dict[str, Any], rows: ValidRows | None) -> dict[str, Tensor]:
        if self.scale is None or rows is None:
            return {"logits": self.plain(**inputs).logits}
        hidden_ND = rows.pack(hidden_states(self.plain, self.head, inputs))
        states = TeacherStates(hidden_ND, scaled_head(self.scale, self.head.linear))
        return {"measures": label_measures(states, rows.labels)}

    @contextmanager
    def _expert_load(self, inputs: dict[str, Any]) -> Iterator[Any]:
        if not self.layers:
            yield None
            return
        with collect_expert_load(self.layers, inputs.get("attention_mask")) as load:
            yield load

    def _total(self, parts: dict[str, Tensor]) -> Tensor:
        task, distilled = parts["task"], parts.get("distillation")
        if distilled is None:
            return task
        alignment = self.alignment
        if alignment is None or alignment.where == "features":
            return task + distilled
        if alignment.is_measuring:
            alignment.observe(*parameter_products(task, distilled, self._measured_parameters(alignment)))
        return alignment.factor.to(task.dtype) * task + distilled

    def _measured_parameters(self, alignment: GradientAlignment) -> list[nn.Parameter]:
        """Of "backbone" those that both losses reach: a head that is tied is an embedding too."""
        if alignment.where == "all":
            return list(self.parameters())
        plain, head = self.plain, self.head.name + "."
        named = plain.named_parameters(remove_duplicate=False)
        return list({id(p): p for name, p in named if not name.startswith(head)}.values())

    def _language_losses(
        self,
        inputs: dict[str, Any],
        rows: ValidRows,
        said: Said | None,
        num_items: NumItems | None,
        taught: ValidRows | None,
        num_taught: NumItems | None,
    ) -> dict[str, Tensor]:
        """Of hidden states: no logits but in tiles."""
        assert self.scale is not None
        recipe, linear = self.recipe, self.head.linear
        hidden_ND = rows.pack(hidden_states(self.plain, self.head, inputs))
        whole = scaled_head(self.scale, linear)
        weight = recipe.weight_for(self.num_columns or whole.width)
        labelled: dict[str, Any] = {"labels": rows.labels, "num_items": num_items}
        is_dual = isinstance(self.student, DualHeadStudent)
        is_of_all = taught is None and self.num_columns in (None, whole.width)
        if said is not None and recipe.label_weight and is_of_all and not is_dual:
            objective = recipe.objective(by_likeliest=isinstance(said, TopK))
            both = cross_entropy_plus(objective, weight, label_weight=recipe.label_weight)
            return {"loss": fused_loss(hidden_ND, whole, both, teacher=said, **labelled)}
        task_ND, distilled_ND = self._split(hidden_ND, said) if is_dual else (hidden_ND, hidden_ND)
        parts: dict[str, Tensor] = {}
        if recipe.label_weight or said is None:
            parts["task"] = fused_loss(task_ND, whole, cross_entropy(), **labelled) * recipe.label_weight
        if said is None:
            return parts
        if taught is None:
            taught, num_taught = rows, num_items
        else:
            distilled_ND = distilled_ND.index_select(0, rows.indices(taught))
        if isinstance(self.student, DualHeadStudent):
            distilled_ND, linear = self.student.auxiliary_parts(distilled_ND)
        head = scaled_head(self.scale, linear, self.num_columns)
        found = distillation_loss(recipe, distilled_ND, head, said, taught.labels, num_taught)
        parts["distillation" if parts else "loss"] = found * weight
        return parts

    def _class_losses(
        self,
        inputs: dict[str, Any],
        labels_N: Tensor,
        rows: ValidRows | None,
        said: Said | None,
        num_items: NumItems | None,
    ) -> dict[str, Tensor]:
        """Of logits, which are few."""
        if isinstance(self.student, DualHeadStudent):
            self.student.alignment = self._feature_alignment(said)
            both = self.student(**inputs)
            logits, heard = both.logits, both.auxiliary_logits
        else:
            logits = heard = self.plain(**inputs).logits
        if rows is not None:
            logits, heard = rows.pack(logits), rows.pack(heard)
        parts = {"task": cross_entropy_mean(logits, labels_N, num_items) * self.recipe.label_weight}
        if said is not None:
            found = distillation_loss(self.recipe, heard, None, said, labels_N, num_items)
            parts["distillation"] = found * self.recipe.weight_for(heard.shape[-1])
        return parts

    def _feature_alignment(self, said: Said | None) -> GradientAlignment | None:
        """None without a teacher too, or the factor of the first phase would go on in the second."""
        is_used = said is not None and self.alignment is not None and self.alignment.where == "features"
        return self.alignment if is_used else None

    def _split(self, hidden_ND: Tensor, said: Said | None) -> tuple[Tensor, Tensor]:
        alignment = self._feature_alignment(said)
        if alignment is None or not torch.is_grad_enabled():
            return hidden_ND, hidden_ND
        return align(hidden_ND, alignment)
