"""LoSparse's pruning of S while it is trained: rows go by their smoothed importance."""

# E experts, N rows of S, I inputs

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...moe.low_rank import LowRankMap
from .schedule import kept_share

SMOOTHING = 0.85


@dataclass(frozen=True, kw_only=True)
class RowPruning:
    """When rows go, and how many stay.

    Attributes:
        final: Share of the rows of each matrix that stays.
        total: Optimizer steps.
        warm_up: See `kept_share`.
        cool_down: See `kept_share`.
    """

    final: float
    total: int
    warm_up: int
    cool_down: int

    def share(self, step: int) -> float:
        """Kept at a step."""
        return kept_share(step, self.total, self.final, warm_up=self.warm_up, cool_down=self.cool_down)


class RowPruner(TrainerCallback):
    """Zeroes the least important rows of S after each step.

    Importance of a row: mean over its entries of ``|s dL/ds|``, smoothed by 0.85. In every matrix the share
    of the schedule stays, exactly: ``round(share x rows)``. A row of zeros has importance 0, so what went
    seldom comes back. `finish` drops the rest for good.

    Args:
        model: With low-rank maps whose S still has all rows that may stay.
        pruning: The schedule.

    Raises:
        ValueError: There is nothing to prune.

    Reference: LoSparse, arXiv:2306.11222; MC-SMoE, arXiv:2310.01334, section 3.2.

    *Departs from the code*: one threshold for each matrix, not for all of a model, so that experts of a layer
    stay of one size.
    """

    def __init__(self, model: nn.Module, pruning: RowPruning) -> None:
        self.maps = [module for module in model.modules() if isinstance(module, LowRankMap)]
        if not any(made.rows.shape[1] for made in self.maps):
            raise ValueError("the model has no rows of S to prune; factorise it with sparse_rows=1 first")
        self.pruning = pruning
        self.importance = [torch.zeros_like(made.rows[..., 0], dtype=torch.float32) for made in self.maps]

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hear the gradients."""
        for made, smoothed_EN in zip(self.maps, self.importance, strict=True):
            if made.rows.grad is not None:
                now_EN = (made.rows * made.rows.grad).abs().float().mean(-1)
                smoothed_EN.mul_(SMOOTHING).add_(now_EN, alpha=1 - SMOOTHING)

    @torch.no_grad()
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Zero what the schedule does not keep."""
        for made, kept_EN in zip(self.maps, self.masks(state.global_step), strict=True):
            made.rows.mul_(kept_EN[..., None])

    def masks(self, step: int) -> Sequence[Float[Tensor, "E N"]]:
        """1 for rows that stay at a step."""
        found = []
        for smoothed_EN in self.importance:
            num_kept = round(self.pruning.share(step) * smoothed_EN.shape[1])
            order_EN = smoothed_EN.argsort(dim=1, descending=True, stable=True)[:, :num_kept]
            found.append(torch.zeros_like(smoothed_EN).scatter_(1, order_EN, 1.0))
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint of the training needs beside the model, on the CPU."""
        return {f"importance.{i}": smoothed_EN.cpu() for i, smoothed_EN in enumerate(self.importance)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            ValueError: It is of other maps.
        """
        for i, smoothed_EN in enumerate(self.importance):
            found = state.get(f"importance.{i}")
            if found is None or found.shape != smoothed_EN.shape or not found.isfinite().all():
                raise ValueError(f"importance.{i} is not finite and of shape {tuple(smoothed_EN.shape)}")
            smoothed_EN.copy_(found)

    @torch.no_grad()
    def finish(self) -> None:
        """Drop for good the rows that are not kept at the end."""
        for made, kept_EN in zip(self.maps, self.masks(self.pruning.total), strict=True):
            num_kept = int(kept_EN[0].sum())
            order_EN = kept_EN.argsort(dim=1, descending=True, stable=True)[:, :num_kept].sort(1).values
            wide_ENI = order_EN[..., None].expand(-1, -1, made.rows.shape[2])
            made.rows = nn.Parameter(made.rows.gather(1, wide_ENI), requires_grad=made.rows.requires_grad)
            made.row_index = made.row_index.gather(1, order_EN)
