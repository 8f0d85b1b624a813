"""What a compression report says, as plain data: numbers, tuples and strings that any job can fill.

`write_report` (report.py) turns a `ReportContent` into HTML, JSON and pictures; `figures.py` draws from it.
Nothing here knows a model, a tokenizer or transformers.
"""

# Dimensions: experts E.

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .gain_map import GainMap

Interval = tuple[float, float]

# Upper ends of the relative rise in perplexity, with the words that the verdict uses for it.
VERDICT_BANDS = (
    (0.02, "Almost nothing was lost."),
    (0.10, "A little was lost."),
    (0.30, "The loss is plain to see: {heal}."),
    (math.inf, "The model is badly damaged: keep more experts, or {heal}."),
)


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One MoE layer: how its experts were used, which are alike, and what became of them."""

    name: str
    """Module path of the layer, for instance "model.layers.3.mlp"."""
    num_experts: int
    """E, the experts before."""
    num_kept: int
    """The experts after: groups that hold at least one expert."""
    usage: Sequence[float]
    """Share of the layer's top-k selections that each expert got, in [0, 1], length E."""
    group_of: Sequence[int | None]
    """Group that each expert belongs to, length E; None where the expert was removed."""
    similarity: Any = None
    """[E, E] similarity of the experts, nested lists or an array, 1 on the diagonal; None if not measured."""
    too_few: Sequence[int] = ()
    """Experts that saw too few calibration tokens to be judged."""
    dead: Sequence[int] = ()
    """Experts that no calibration token was sent to."""
    fate: str = "removed"
    """Of the experts that are in no group; or "constant": replaced by their mean output."""
    entropy: float | None = None
    """Mean entropy of the router's distribution per token, nats, at most ln(E)."""

    def __post_init__(self) -> None:
        """Refuse parts that do not describe the same experts."""
        for what, got in (("usage", len(self.usage)), ("group_of", len(self.group_of))):
            if got != self.num_experts:
                raise ValueError(f"{what} has {got} entries, not {self.num_experts} (layer {self.name!r})")
        square = (self.num_experts, self.num_experts)
        if self.similarity is not None and np.shape(self.similarity) != square:
            raise ValueError(f"similarity is {np.shape(self.similarity)}, not {square} (layer {self.name!r})")
        outside = [e for e in (*self.too_few, *self.dead) if not 0 <= e < self.num_experts]
        if outside:
            raise ValueError(f"experts {outside} are not in 0..{self.num_experts - 1} (layer {self.name!r})")

    def groups(self) -> dict[int, list[int]]:
        """Experts of each group, the most used first; groups in ascending order."""
        members: dict[int, list[int]] = {}
        for expert in sorted(range(self.num_experts), key=lambda e: -self.usage[e]):
            group = self.group_of[expert]
            if group is not None:
                members.setdefault(group, []).append(expert)
        return dict(sorted(members.items()))

    def removed(self) -> list[int]:
        """Experts that belong to no group."""
        return [expert for expert, group in enumerate(self.group_of) if group is None]


@dataclass(frozen=True, kw_only=True)
class DomainRow:
    """What was lost on the held-out text of one domain (or on all of it)."""

    domain: str
    """Name of the domain."""
    num_tokens: int
    """Held-out tokens that were scored."""
    perplexity_original: float
    """exp(mean cross entropy) of the original model, per token."""
    perplexity_compressed: float
    """The same of the compressed model."""
    kl: float
    """Mean KL(original || compressed), nats per token."""
    top1_agreement: float
    """Share of positions where both models rank the same token first, in [0, 1]."""
    kl_interval: Interval | None = None
    """95% interval of `kl`."""
    top1_agreement_interval: Interval | None = None
    """95% interval of `top1_agreement`."""
    perplexity_ratio_interval: Interval | None = None
    """95% interval of perplexity_compressed / perplexity_original, resampled in pairs."""

    @property
    def perplexity_change(self) -> float:
        """Relative change of perplexity: 0.1 is 10% worse, negative is better."""
        if not self.perplexity_original:
            return math.nan
        return self.perplexity_compressed / self.perplexity_original - 1

    @property
    def perplexity_change_interval(self) -> Interval | None:
        """95% interval of `perplexity_change`."""
        if self.perplexity_ratio_interval is None:
            return None
        low, high = self.perplexity_ratio_interval
        return low - 1, high - 1

    @classmethod
    def from_measured(cls, measured: Any) -> "DomainRow":
        """Take the row from `fidelity.DomainFidelity`, or from anything with its attributes."""

        def interval(estimate: Any) -> Interval | None:
            return None if estimate.low is None or estimate.high is None else (estimate.low, estimate.high)

        return cls(
            domain=measured.domain,
            num_tokens=measured.num_tokens,
            perplexity_original=measured.perplexity_original.value,
            perplexity_compressed=measured.perplexity_compressed.value,
            perplexity_ratio_interval=interval(measured.perplexity_ratio),
            kl=measured.kl.value,
            kl_interval=interval(measured.kl),
            top1_agreement=measured.top1_agreement.value,
            top1_agreement_interval=interval(measured.top1_agreement),
        )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One number of the original model beside the same number of the compressed one."""

    name: str
    """What was measured, in words: "Completions that end in a loop"."""
    before: float
    """Value of the original model."""
    after: float
    """Value of the compressed model."""
    unit: str = "share"
    """A fraction in [0, 1] has the unit "share" and is shown in percent; others stand after the number."""
    before_interval: Interval | None = None
    """95% interval of `before`."""
    after_interval: Interval | None = None
    """95% interval of `after`."""
    count: int | None = None
    """How many completions, questions or runs the numbers rest on."""
    higher_is_better: bool = True
    """False for what should be small, such as the share of loops."""


@dataclass(frozen=True, slots=True)
class HealingRow:
    """One measure of the original, of the compressed model, and of that once it was healed; as text."""

    name: str
    original: str
    one_shot: str
    healed: str


@dataclass(frozen=True, kw_only=True)
class ReportContent:
    """Everything that a compression report shows; what was not measured stays empty, and it says so."""

    title: str
    """Heading of the page."""
    model: str
    """Path or hub id of the original model."""
    method: str
    """Compression method, for instance "m-smoe"."""
    grouping: str
    """How experts were grouped, for instance "adaptive"."""
    router: str
    """What was done to the router, for instance "redirect"."""
    form: str
    """Checkpoint form: "moekit" or "stock"."""
    command: str
    """The command line that made the checkpoint."""
    versions: Mapping[str, str]
    """Version of each package that the result depends on."""
    seed: int
    """Seed of the run."""
    plan_hash: str
    """Hash of the compression plan."""
    layers: Sequence[LayerReport]
    """MoE layers in forward order."""
    num_parameters: tuple[int, int]
    """All parameters, before and after."""
    num_bytes: tuple[int, int]
    """Bytes of the weights on disk, before and after."""
    parameters_by_part: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Parameters of each part (embeddings, attention, routers, experts, ...), before and after."""
    bytes_by_part: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Bytes of each part, before and after."""
    overall: DomainRow | None = None
    """Fidelity over all held-out tokens; None if it was not measured."""
    domains: Sequence[DomainRow] = ()
    """Fidelity by domain."""
    generation: Sequence[Comparison] = ()
    """Loops, answer accuracy and whatever else was measured on generated text."""
    throughput: Sequence[Comparison] = ()
    """Speed, for instance prefill and decoding in tokens/s."""
    healing: Sequence[HealingRow] = ()
    """What healing has done; empty if there was none."""
    is_healed: bool = False
    """Whether the result has learned from the original, measured before or not."""
    gains: GainMap | None = None
    """How far the model could be cut; None if that was not asked."""
    warnings: Sequence[str] = ()
    """What the reader must know before trusting the model; plain text."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Further facts for the last section, for instance the calibration data and its token count."""

    def num_experts(self) -> tuple[int, int]:
        """Experts of all layers, before and after."""
        return sum(layer.num_experts for layer in self.layers), sum(layer.num_kept for layer in self.layers)


def verdict(content: ReportContent) -> str:
    """Say in two to five plain sentences what was gained and what was lost.

    The judgement follows the relative rise of perplexity over all held-out tokens: at most 2% "almost
    nothing", 10% "a little", 30% "plain to see", above that "badly damaged" (`VERDICT_BANDS`).
    """
    before, after = content.num_bytes
    change = f"{1 - after / before:.0%} smaller" if after < before else "not smaller"
    sentences = [f"The checkpoint is {change}."]
    if content.overall is None:
        return " ".join([*sentences, "What was lost is unknown: no held-out text was scored."])
    rise = content.overall.perplexity_change
    if math.isnan(rise):
        return " ".join([*sentences, "What was lost is unknown: perplexity is not a number."])
    heal = "heal it for longer" if content.is_healed else "heal it before use (moekit distill)"
    sentences.append(next(words for limit, words in VERDICT_BANDS if rise <= limit).format(heal=heal))
    sentences.append(
        f"Over {content.overall.num_tokens:,} held-out tokens perplexity {_moved(rise)}, and both models "
        f"rank the same token first at {content.overall.top1_agreement:.1%} of positions."
    )
    worst = max(content.domains, key=lambda row: row.perplexity_change, default=None)
    if worst is not None and len(content.domains) > 1 and worst.perplexity_change > 0:
        sentences.append(
            f"The domain that lost most is {worst.domain}: there it {_moved(worst.perplexity_change)}."
        )
    sentences.extend(_clearly_worse(content.generation))
    return " ".join(sentences)


def _moved(rise: float) -> str:
    """A relative change in words; a factor where percents would be long."""
    if rise >= 10:
        return f"rose to {1 + rise:.3g} times its value" if math.isfinite(rise) else "rose beyond measure"
    return f"rose by {rise:.1%}" if rise >= 0 else f"fell by {-rise:.1%}"


def _clearly_worse(comparisons: Sequence[Comparison]) -> list[str]:
    """One sentence for each measure whose two intervals do not overlap, on the bad side."""
    sentences = []
    for row in comparisons:
        if row.before_interval is None or row.after_interval is None:
            continue
        lower, higher = (
            (row.after_interval, row.before_interval)
            if row.higher_is_better
            else (row.before_interval, row.after_interval)
        )
        if lower[1] < higher[0]:
            share = row.unit == "share"
            values = [f"{v:.1%}" if share else f"{v:,.4g} {row.unit}" for v in (row.before, row.after)]
            name = f"{row.name} (of {row.count})" if row.count else row.name
            sentences.append(f"{name}: clearly worse, {values[0]} before and {values[1]} after.")
    return sentences
