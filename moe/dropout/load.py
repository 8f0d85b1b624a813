"""How many tokens each expert gets while the model trains."""

# T tokens, E experts, K active experts

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from torch import distributed as dist
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .convert import require_smoe_layers
from .observe import RoutedTokens, observe_routers

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RelativeLoad:
    """The extremes of the experts' loads in units of their mean; both are 1 in perfect balance."""

    max_load: float
    min_load: float

    @classmethod
    def of(cls, num_tokens_per_expert: Int64[Tensor, " E"]) -> "RelativeLoad":
        """Of one layer's counts, which are not all zero."""
        load_E = num_tokens_per_expert.double() / num_tokens_per_expert.double().mean()
        return cls(float(load_E.max()), float(load_E.min()))


def add_choices(counts_E: Tensor, routed: RoutedTokens) -> Tensor:
    """Add a router's choices to ``[E]`` long counts, in place and without waiting for the device."""
    ids_TK = routed.expert_ids
    if routed.counted is None:
        ones_TK = counts_E.new_ones(()).expand(ids_TK.shape)
    else:
        ones_TK = routed.counted.to(counts_E.dtype)[:, None].expand(ids_TK.shape)
    return counts_E.scatter_add_(0, ids_TK.flatten(), ones_TK.flatten())


class LoadMeter:
    """Counts the tokens of each expert over the forwards in training mode.

    Padding never counts, nor do evaluations and the repeats of gradient checkpointing. Between two readings
    nothing leaves the device.

    Args:
        model: With SMoE-Dropout layers. It is watched from now on until `close`, or as a context.

    Raises:
        UnsupportedModelError: It has none.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        layers = require_smoe_layers(model)
        self._counts = {
            name: torch.zeros(layer.num_experts, dtype=torch.int64) for name, layer in layers.items()
        }
        self._stack = ExitStack()
        self._stack.enter_context(observe_routers(model, self._add))

    def __enter__(self) -> "LoadMeter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop counting; what was counted can still be read."""
        self._stack.close()

    def _add(self, routed: RoutedTokens) -> None:
        if routed.router.training:
            counts_E = self._counts[routed.layer].to(routed.expert_ids.device)
            self._counts[routed.layer] = add_choices(counts_E, routed)

    def read_and_reset(self) -> dict[str, Int64[Tensor, " E"]]:
        """Return each layer's tokens by expert since the last reading, over all processes, on the CPU.

        In distributed training every process must call it.
        """
        counts_LE = torch.stack(list(self._counts.values()))
        for counts_E in self._counts.values():
            counts_E.zero_()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts_LE)
        return dict(zip(self._counts, counts_LE.cpu(), strict=True))


class ExpertLoadCallback(TrainerCallback):
    """Adds the experts' load since the last log to the training logs of any Trainer.

    ``max_load`` and ``min_load`` are relative to the mean, each of the layer where it is worst;
    ``dead_experts`` counts those of all layers that no token reached. The first of them is warned of.
    Reporters that the Trainer makes by itself run before this callback, as `ActiveExpertsCallback` says.
    """

    def __init__(self) -> None:
        self.meter: LoadMeter | None = None
        self.has_warned = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to count."""
        self.on_train_end(args, state, control)  # of a training that an error ended
        self.meter = LoadMeter(kwargs["model"])

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the load to the callbacks after this one, and to the Trainer's history."""
        logs = kwargs["logs"]
        if self.meter is None or "loss" not in logs:  # an evaluation, or the summary of the training
            return
        counts = {name: counts_E for name, counts_E in self.meter.read_and_reset().items() if counts_E.any()}
        if not counts:
            return
        loads = [RelativeLoad.of(counts_E) for counts_E in counts.values()]
        dead = {name: (counts_E == 0).nonzero().flatten().tolist() for name, counts_E in counts.items()}
        self._warn(dead)
        for record in (logs, *state.log_history[-1:]):
            record["max_load"] = max(load.max_load for load in loads)
            record["min_load"] = min(load.min_load for load in loads)
            record["dead_experts"] = sum(map(len, dead.values()))

    def _warn(self, dead: dict[str, list[int]]) -> None:
        name = next((name for name, experts in dead.items() if experts), None)
        if name is None or self.has_warned:
            return
        self.has_warned = True
        logger.warning(
            "no token reached the experts %s of layer %r since the last log; they do not learn. Balance a "
            "frozen router with center_routers, a learned one with load_balance, or use more active experts",
            dead[name],
            name,
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop counting."""
        if self.meter is not None:
            self.meter.close()
            self.meter = None
