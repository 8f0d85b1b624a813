"""What a descent takes from a model, cut by cut: experts, or the rank of their matrices."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from transformers import PreTrainedModel

from ..compress.apply import apply_plan
from ..compress.layer_plan import keep_experts
from ..compress.methods import METHODS
from ..compress.plan import CompressionPlan, LowRankRule, ModelIdentity
from ..moe.data import TokenBlocks
from ..moe.discovery import expert_layers
from ..moe.samples import InputSamples
from ..moe.statistics import RoutingStatistics
from .calibrate import record
from .console import is_interactive
from .load import load_model
from .low_rank_sizes import first_saving_rank, rank_sizes
from .options import CompressOptions
from .planning import planner_options
from .prepare import Job


class Made(NamedTuple):
    """A model after a cut."""

    model: PreTrainedModel
    kept: dict[str, list[int]]
    """By layer, the experts of the original that are left."""
    report: dict[str, dict[str, Any]]
    """By layer, from `apply_plan`."""


class Cuts(Protocol):
    """One kind of cuts.

    Attributes:
        unit: What its sizes are.
        whole: The size of the original.
        identity: Of the original.
        statistics: Of the original.
    """

    unit: str
    whole: int
    identity: ModelIdentity
    statistics: RoutingStatistics

    @property
    def sizes(self) -> list[int]:
        """All that can be, the whole first."""
        ...

    def told(self, size: int) -> str:
        """A size in words."""
        ...

    def share(self, size: int) -> float:
        """Of the experts' bytes that is left at a size."""
        ...

    def make(self, model: PreTrainedModel, size: int, kept: Mapping[str, Sequence[int]]) -> Made:
        """Cut to a size.

        Args:
            model: As the last cut has left it; may be changed.
            size: Smaller than its own.
            kept: What is left of the original in it.
        """
        ...

    def plan(self, size: int, kept: Mapping[str, Sequence[int]] | None = None) -> CompressionPlan:
        """From the original to a size; of any experts, unless it is said which are left."""
        ...


class ExpertCuts:
    """Fewer experts in every layer, chosen at each cut among those that the last has left.

    Args:
        job: What was asked for.
        model: The original.
    """

    unit = "experts of each layer"

    def __init__(self, job: Job, model: PreTrainedModel) -> None:
        layers = expert_layers(model)
        self.job, self.identity = job, ModelIdentity.of(layers)
        self.whole, self.least = layers[0].num_experts, max(layer.top_k for layer in layers)
        self.names = [layer.name for layer in layers]
        self.statistics = _recorded(job, model)

    @property
    def sizes(self) -> list[int]:
        """Down to as many experts as a token chooses."""
        return list(range(self.whole, self.least - 1, -1))

    def told(self, size: int) -> str:
        """In words."""
        return f"{size} experts"

    def share(self, size: int) -> float:
        """All experts are of one size."""
        return size / self.whole

    def make(self, model: PreTrainedModel, size: int, kept: Mapping[str, Sequence[int]]) -> Made:
        """Judge the experts that are left anew, and drop the last of them."""
        said = planner_options(self.job.options) | {"experts": size, "ratio": None, "grouping": "uniform"}
        plan = METHODS[self.job.options.method](expert_layers(model), _recorded(self.job, model), **said)
        left = {layer.name: [kept[layer.name][core] for core in layer.cores] for layer in plan.layers}
        return Made(model, left, apply_plan(model, plan))

    def plan(self, size: int, kept: Mapping[str, Sequence[int]] | None = None) -> CompressionPlan:
        """Without the other rows of the router."""
        left = kept or {name: list(range(size)) for name in self.names}
        layers = tuple(keep_experts(name, self.whole, self.least, list(left[name])) for name in self.names)
        return CompressionPlan(
            model=self.identity,
            method=self.job.options.method,
            form=self.job.options.form,
            router="slice",
            layers=layers,
            requested_experts=sum(layer.num_kept for layer in layers),
            settings={"grouping": "uniform"},
        )


class RankCuts:
    """All experts, as products of a lower rank: at each cut anew of the original's matrices.

    Factors of factors would lose more, so a cut begins with the original and not with what the last cut and
    its healing have left; it gives what ``--rank`` alone gives.

    Args:
        job: What was asked for.
        model: The original.
    """

    unit = "rank of the experts' matrices"

    def __init__(self, job: Job, model: PreTrainedModel) -> None:
        layers = expert_layers(model)
        self.job, self.identity = job, ModelIdentity.of(layers)
        self.top_k = {layer.name: (layer.num_experts, layer.top_k) for layer in layers}
        self.whole, self.largest = first_saving_rank(layers, job.options.sparse_rows)
        self.samples = InputSamples()
        self.statistics = _recorded(job, model, self.samples)

    @property
    def sizes(self) -> list[int]:
        """The original, which counts as the rank from which on factors save bytes, and ranks below it."""
        return [self.whole, *rank_sizes(self.whole, self.largest)]

    def told(self, size: int) -> str:
        """In words."""
        return f"rank {size}" if size < self.whole else "the whole matrices"

    def share(self, size: int) -> float:
        """That of the factors, and of the rows that stay beside them."""
        rows = self.job.options.sparse_rows
        return rows + (1 - rows) * size / self.whole

    def make(self, model: PreTrainedModel, size: int, kept: Mapping[str, Sequence[int]]) -> Made:
        """Factorise the original."""
        options = self.job.options
        fresh = load_model(self.job.source, dtype=options.dtype, device=options.device)
        report = apply_plan(fresh, self.plan(size), samples=self.samples)
        return Made(fresh, {name: list(experts) for name, experts in kept.items()}, report)

    def plan(self, size: int, kept: Mapping[str, Sequence[int]] | None = None) -> CompressionPlan:
        """All experts; the original itself at its own size."""
        options = self.job.options
        rule = LowRankRule(rank=size, sparse_rows=options.sparse_rows) if size < self.whole else None
        layers = tuple(keep_experts(name, number, top_k) for name, (number, top_k) in self.top_k.items())
        return CompressionPlan(
            model=self.identity,
            method="low-rank",
            form=options.form,
            router="slice",
            layers=layers,
            low_rank=rule,
            requested_experts=sum(layer.num_kept for layer in layers),
            settings={},
        )


CUTS: dict[str, type[ExpertCuts] | type[RankCuts]] = {"experts": ExpertCuts, "rank": RankCuts}
"""By ``--take``."""


def _recorded(job: Job, model: PreTrainedModel, samples: InputSamples | None = None) -> RoutingStatistics:
    """Of a model on all of the calibration text."""
    blocks: TokenBlocks = job.texts.calibration
    options: CompressOptions = job.options
    found = record(
        model, expert_layers(model), blocks, options.batch_size, progress=is_interactive(), samples=samples
    )
    return RoutingStatistics(layers=found.layers, fingerprint={"data": blocks.fingerprint})
