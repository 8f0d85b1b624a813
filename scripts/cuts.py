"""What a descent takes from a model, cut by cut: experts, or the rank of their matrices."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from ..compress.apply import apply_plan
from ..compress.layer_plan import LayerPlan, keep_experts
from ..compress.methods import METHODS
from ..compress.plan import CompressionPlan, LowRankRule, ModelIdentity
from ..moe.discovery import expert_layers
from ..moe.samples import InputSamples
from ..moe.statistics import RoutingStatistics
from .calibrate import record
from .console import is_interactive
from .load import load_model
from .low_rank_sizes import first_saving_rank, rank_sizes
from .planning import planner_options
from .prepare import Job


class Made(NamedTuple):
    """A model after a cut."""

    model: PreTrainedModel
    kept: dict[str, list[int]]
    """By layer, the experts of the original that are left."""
    report: dict[str, dict[str, Any]]
    """By layer, from `apply_plan`."""


class Cuts(ABC):
    """One kind of cuts.

    Attributes:
        unit: What its sizes are.
        whole: The size of the original.
        identity: Of the original.
        statistics: Of the original.

    Args:
        job: What was asked for.
        model: The original.
        samples: Filled with what its experts read, if given.
    """

    unit: str
    whole: int

    def __init__(self, job: Job, model: PreTrainedModel, samples: InputSamples | None = None) -> None:
        self.job, self.identity = job, ModelIdentity.of(expert_layers(model))
        self.statistics = self.recorded(model, samples)

    @property
    @abstractmethod
    def sizes(self) -> list[int]:
        """All that can be, the whole first."""

    @abstractmethod
    def told(self, size: int) -> str:
        """A size in words."""

    @abstractmethod
    def share(self, size: int) -> float:
        """Of the experts' bytes that is left at a size."""

    @abstractmethod
    def make(self, model: PreTrainedModel, size: int, kept: Mapping[str, Sequence[int]]) -> Made:
        """Cut to a size.

        Args:
            model: As the last cut has left it; may be changed.
            size: Smaller than its own.
            kept: What is left of the original in it.
        """

    @abstractmethod
    def plan(self, size: int, kept: Mapping[str, Sequence[int]] | None = None) -> CompressionPlan:
        """From the original to a size; of any experts, unless it is said which are left."""

    def recorded(self, model: PreTrainedModel, samples: InputSamples | None = None) -> RoutingStatistics:
        """Of a model on all of the calibration text."""
        blocks, size = self.job.texts.calibration, self.job.options.batch_size
        layers, progress = expert_layers(model), is_interactive()
        found = record(model, layers, blocks, size, progress=progress, samples=samples)
        return RoutingStatistics(layers=found.layers, fingerprint={"data": blocks.fingerprint})

    def planned(self, layers: Iterable[LayerPlan], **more: Any) -> CompressionPlan:
        """A plan of these layers, behind routers that keep the rows of the experts that stay."""
        plans = tuple(layers)
        return CompressionPlan(
            model=self.identity,
            form=self.job.options.form,
            router="slice",
            layers=plans,
            requested_experts=sum(plan.num_kept for plan in plans),
            **more,
        )


class ExpertCuts(Cuts):
    """Fewer experts in every layer, chosen at each cut among those that the last has left."""

    unit = "experts of each layer"

    def __init__(self, job: Job, model: PreTrainedModel) -> None:
        super().__init__(job, model)
        layers = expert_layers(model)
        self.whole, self.least = layers[0].num_experts, max(layer.top_k for layer in layers)
        self.names = [layer.name for layer in layers]

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
        plan = METHODS[self.job.options.method](expert_layers(model), self.recorded(model), **said)
        left = {layer.name: [kept[layer.name][core] for core in layer.cores] for layer in plan.layers}
        return Made(model, left, apply_plan(model, plan))

    def plan(self, size: int, kept: Mapping[str, Sequence[int]] | None = None) -> CompressionPlan:
        """Without the other rows of the router."""
        left = kept or {name: list(range(size)) for name in self.names}
        layers = (keep_experts(name, self.whole, self.least, list(left[name])) for name in self.names)
        return self.planned(layers, method=self.job.options.method, settings={"grouping": "uniform"})


class RankCuts(Cuts):
    """All experts, as products of a lower rank: at each cut anew of the original's matrices.

    Factors of factors would lose more, so a cut begins with the original and not with what the last cut and
    its healing have left; it gives what ``--rank`` alone gives.
    """

    unit = "rank of the experts' matrices"

    def __init__(self, job: Job, model: PreTrainedModel) -> None:
        self.samples = InputSamples()
        super().__init__(job, model, self.samples)
        layers = expert_layers(model)
        self.layers = [keep_experts(layer.name, layer.num_experts, layer.top_k) for layer in layers]
        self.whole, self.largest = first_saving_rank(layers, job.options.sparse_rows)

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
        rows = self.job.options.sparse_rows
        rule = LowRankRule(rank=size, sparse_rows=rows) if size < self.whole else None
        return self.planned(self.layers, method="low-rank", low_rank=rule)


CUTS: dict[str, type[ExpertCuts] | type[RankCuts]] = {"experts": ExpertCuts, "rank": RankCuts}
"""By ``--take``."""
