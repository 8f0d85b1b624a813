"""The Trainer of SMoE-Dropout and the models it is compared with, each with its own objective."""

# T tokens, E experts, K active experts, V vocabulary

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..trainer import MoETrainer, check_one_gpu
from .balance import load_balance_loss
from .build import smoe_layers
from .observe import RoutedTokens, observe_routers
from .thor import consistency_loss


class DropoutTrainer(MoETrainer):
    """Trainer that adds what the routers of the model need to its loss; for frozen and hash routers nothing.

    Learned routers get ``load_balance`` times the mean of their layers' `load_balance_loss`, of each
    micro-batch by itself. THOR's get a second forward: the loss is the sum of both forwards' losses and
    ``consistency`` times the symmetric divergence of their predictions. Evaluation has the plain loss always,
    so that models can be compared; the training loss in the logs is the whole objective.

    Args:
        *args: As for Trainer.
        load_balance: Of learned routers; 0.01 in Switch Transformers.
        consistency: alpha of THOR; 1 in the official code.
        **kwargs: As for Trainer.

    Raises:
        ValueError: A factor is negative; or several GPUs in one process with such routers.

    Reference: Fedus et al., arXiv:2101.03961, eq. 4; Zuo et al., arXiv:2110.04260.
    """

    def __init__(
        self, *args: Any, load_balance: float = 0.01, consistency: float = 1.0, **kwargs: Any
    ) -> None:
        for name, factor in (("load_balance", load_balance), ("consistency", consistency)):
            if not 0 <= factor < float("inf"):
                raise ValueError(f"{name}={factor} is not a finite number of at least 0")
        super().__init__(*args, **kwargs)
        routers: list[Any] = [layer.router for layer in smoe_layers(self.plain_model).values()]
        kinds = {router.kind for router in routers}
        self.load_balance = load_balance if "learned" in kinds else 0.0
        self.consistency = consistency
        self.is_thor = "thor" in kinds
        if self.is_thor or self.load_balance:
            check_one_gpu(self.args, f"the loss of {' and '.join(sorted(kinds))} routers")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the model's own loss; in training with what its routers add."""

        def task() -> Any:
            # A copy, because label smoothing takes the labels out.
            return MoETrainer.compute_loss(self, model, dict(inputs), True, num_items_in_batch)

        if not model.training:
            loss, outputs = task()
        elif self.is_thor:
            loss, outputs = task()
            second, again = task()
            divergence = self._divergence(inputs, outputs["logits"], again["logits"], num_items_in_batch)
            loss = loss + second + self.consistency * divergence
        elif self.load_balance:
            with self._collect_routing() as routings:
                loss, outputs = task()
            # Only now: within the layers, gradient checkpointing would have to repeat it.
            terms = [load_balance_loss(*routing).to(loss.device) for routing in routings]
            balance = torch.stack(terms).mean()
            parts = self.current_gradient_accumulation_steps if self._is_scaled(num_items_in_batch) else 1
            loss = loss + self.load_balance * balance / parts
        else:
            loss, outputs = task()
        return (loss, outputs) if return_outputs else loss

    def _is_scaled(self, num_items: Tensor | int | None) -> bool:
        """Whether losses of micro-batches are added up; else the Trainer will take their mean."""
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        return (
            self.model_accepts_loss_kwargs and num_items is not None
        ) or self.compute_loss_func is not None

    @contextmanager
    def _collect_routing(self) -> Iterator[list[tuple[Tensor, Tensor, Tensor | None]]]:
        """Logits, choices and tokens that count, of every layer."""
        routings: list[tuple[Tensor, Tensor, Tensor | None]] = []

        def add(routed: RoutedTokens) -> None:
            if not routed.router_logits.requires_grad:
                raise ValueError(
                    f"the router of layer {routed.layer!r} gets no gradient from load_balance: train it, use "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}, or set load_balance=0"
                )
            routings.append((routed.router_logits, routed.expert_ids, routed.counted))

        with observe_routers(self.plain_model, add):
            yield routings

    def _divergence(
        self, inputs: dict[str, Any], logits_1: Tensor, logits_2: Tensor, num_items: Tensor | int | None
    ) -> Tensor:
        """Average as the Trainer averages the loss: over the tokens of all micro-batches and processes."""
        labels = inputs.get("shift_labels", inputs.get("labels"))
        if labels is not None and self._loss_shifts_labels and "shift_labels" not in inputs:
            labels, logits_1, logits_2 = labels[..., 1:], logits_1[..., :-1, :], logits_2[..., :-1, :]
        if labels is None or labels.shape != logits_1.shape[:-1]:  # no loss of tokens
            counted = torch.ones(logits_1.shape[:-1], dtype=torch.bool, device=logits_1.device)
        else:
            counted = labels.to(logits_1.device) != -100
        if not self._is_scaled(num_items):
            return consistency_loss(logits_1, logits_2, counted)
        mean = consistency_loss(logits_1, logits_2, counted, num_items=num_items)
        shares = self.args.average_tokens_across_devices
        return mean * (self.accelerator.num_processes // self.get_tp_size() if shares else 1)
