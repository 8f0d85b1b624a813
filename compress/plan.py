"""What compression will do, as data: which experts of each layer merge, into what, behind which router.

Planning changes nothing and `apply_plan` (apply.py) is the only thing that changes a model; a plan is what
passes between them. It is JSON that a person may read and edit, checked when it is made or loaded, and again
against the model it is meant for. Reading one needs no torch.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from .layer_plan import ExpertGroup, LayerPlan
from .plan_file import format_json, parse_json, read_record, write_atomically

__all__ = [
    "ALIGNMENTS",
    "FORMS",
    "ROUTERS",
    "AlignmentRule",
    "CompressionPlan",
    "ExpertGroup",
    "LayerPlan",
    "LowRankRule",
    "ModelIdentity",
    "check_form",
    "check_unmerged",
]

FORMAT = "moekit.plan"
VERSION = 1
MAX_EXPERTS = 100_000
"""Largest number of experts of a layer in a plan that is read."""

FORMS = ("moekit", "stock")
"""Checkpoint forms: ``moekit`` holds any plan exactly; ``stock`` is the family's own class, one M for all."""

ROUTERS = ("redirect", "slice", "mean", "logsumexp", "constant")
"""``redirect`` keeps all E rows and sends each choice to its group; ``slice`` keeps the cores' rows; ``mean``
gives each core its group's weighted mean row; ``logsumexp`` chooses groups by their exact probability;
``constant`` keeps all E rows and replaces each expert in no group by its mean output."""

ALIGNMENTS = ("weights", "activations", "both", "none")
"""``weights`` matches neurons by their weights, ``activations`` by what they do on sampled tokens, ``both``
by the sum of the two."""
NEEDS_SAMPLES = ("activations", "both")
"""Alignments for which `apply_plan` needs samples."""

Layer: TypeAlias = Any  # an ExpertLayer; to import it would be to import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelIdentity:
    """Which model a plan is for."""

    model_type: str
    """Of the config that the MoE layers read."""
    layer_class: str
    """Class of the MoE blocks; several are joined by +."""
    num_layers: int
    """MoE layers."""
    fingerprint: str
    """Hash of the layers' names, expert counts and expert shapes; values do not enter."""

    @classmethod
    def of(cls, layers: Sequence[Layer]) -> "ModelIdentity":
        """The identity of the model that these layers belong to."""
        shapes = []
        for layer in layers:
            experts = layer.experts()
            tensors = [(name, list(tensor.shape)) for name, tensor in experts[0].named_tensors()]
            shapes.append((layer.name, layer.num_experts, layer.top_k, len(experts), tensors))
        types = {str(getattr(layer.config, "model_type", "unknown")) for layer in layers}
        return cls(
            model_type="+".join(sorted(types)),
            layer_class="+".join(sorted({type(layer.block).__name__ for layer in layers})),
            num_layers=len(layers),
            fingerprint=hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignmentRule:
    """How the members of a group are aligned before they are added."""

    method: str = "weights"
    """One of ``ALIGNMENTS``."""
    include_down: bool = True
    """Whether the down projection takes part in the matching of ``weights``."""

    def __post_init__(self) -> None:
        """Refuse an unknown method."""
        if self.method not in ALIGNMENTS:
            raise ValueError(f"alignment method {self.method!r} is not one of {', '.join(ALIGNMENTS)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRankRule:
    """That the experts become ``U V + S`` after merging."""

    rank: int
    """R."""
    sparse_rows: float = 0.0
    """Share of the rows of each matrix that S holds, in [0, 1]."""

    def __post_init__(self) -> None:
        """Refuse what no matrix has."""
        if self.rank < 1:
            raise ValueError(f"low-rank experts need a rank of at least 1, got {self.rank}")
        if not 0 <= self.sparse_rows <= 1:
            raise ValueError(f"sparse_rows={self.sparse_rows} is not a share in [0, 1]")


def check_fits(rule: LowRankRule, layer: Layer) -> None:
    """Refuse a rank that a layer's matrices do not have.

    Raises:
        ValueError: It is larger than their smaller side, or the experts are not fused.
    """
    expert = layer.experts()[0]
    largest = min(expert.width, expert.hidden_size)
    if rule.rank > largest:
        raise ValueError(
            f"rank {rule.rank} is larger than the smaller side of the experts' matrices in layer "
            f"{layer.name!r}, {largest}; half of that already saves nothing"
        )
    if not hasattr(layer.experts_module, "has_gate"):
        raise ValueError(
            f"the experts of layer {layer.name!r} are not fused as transformers fuses them "
            f"({type(layer.experts_module).__name__}), so they cannot become low-rank"
        )


def check_form(form: str, router: str) -> None:
    """Refuse a form of checkpoint and a router mode that do not go together.

    Raises:
        ValueError: Either is unknown, or the form cannot hold the router.
    """
    for what, got, allowed in (("form", form, FORMS), ("router", router, ROUTERS)):
        if got not in allowed:
            raise ValueError(f"{what}={got!r} is not one of {', '.join(allowed)}")
    if form == "stock" and router in ("redirect", "logsumexp", "constant"):
        raise ValueError(
            f"router={router!r} keeps a row for every expert, which form='stock' cannot hold; "
            "use router='slice' or 'mean', or form='moekit'"
        )


def check_unmerged(layers: Sequence[Layer]) -> None:
    """Refuse layers whose router chooses among other experts than there are.

    Raises:
        ValueError: A layer was merged with ``redirect`` or ``logsumexp``.
    """
    for layer in layers:
        if layer.router_mode != "full":
            raise ValueError(
                f"experts of layer {layer.name!r} were merged or replaced already (router "
                f"{layer.router_mode!r}) and cannot be again; start from the original model"
            )


@dataclass(frozen=True, kw_only=True)
class CompressionPlan:
    """What `apply_plan` will do to a model.

    A plan that exists is consistent in itself; `validate_against` says whether it fits a model.

    Raises:
        ValueError: On construction, for groups, options or counts that contradict each other.
    """

    model: ModelIdentity
    """Which model it is for."""
    method: str
    """What made it, such as ``m-smoe``."""
    form: str
    """Of the checkpoint, one of ``FORMS``."""
    router: str
    """What becomes of the routers, one of ``ROUTERS``."""
    alignment: AlignmentRule = AlignmentRule()
    """Of the members of a group."""
    low_rank: LowRankRule | None = None
    """Whether the experts become factors."""
    layers: tuple[LayerPlan, ...]
    """Every MoE layer of the model, those that stay as they are included."""
    requested_experts: int
    """Experts over all layers that were asked for; ``actual_experts`` are planned."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Options of the method, for the record; nothing reads them."""
    notes: tuple[str, ...] = ()
    """What the planner wants the reader to know."""

    def __post_init__(self) -> None:
        """Refuse options that contradict each other."""
        check_form(self.form, self.router)
        names = [layer.name for layer in self.layers]
        if not names:
            raise ValueError("the plan has no layers; it must list every MoE layer of the model")
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"layer {repeated[0]!r} occurs twice in the plan")
        if self.router in ("redirect", "logsumexp"):
            self._check_all_rows_served()
        if self.router == "constant" and any(len(g.experts) > 1 for la in self.layers for g in la.groups):
            raise ValueError("router='constant' is for experts that are pruned, not merged; use 'redirect'")
        if self.form == "stock":
            self._check_uniform()
            if self.low_rank is not None:
                raise ValueError("form='stock' has no low-rank experts; use form='moekit'")

    def _check_all_rows_served(self) -> None:
        for layer in self.layers:
            if layer.removed:
                raise ValueError(
                    f"experts {layer.removed} are in no group (layer {layer.name!r}), but "
                    f"router={self.router!r} still chooses them; put each into a group, or use "
                    "router='slice' or 'mean'"
                )

    def _check_uniform(self) -> None:
        sizes = {(layer.num_experts, layer.num_kept): layer.name for layer in self.layers}
        if len(sizes) > 1:
            shown = ", ".join(f"{after} of {before} in {name!r}" for (before, after), name in sizes.items())
            raise ValueError(
                "form='stock' needs the same number of experts in every layer, "
                f"got {shown}; use form='moekit'"
            )

    @property
    def actual_experts(self) -> int:
        """Experts over all layers after compression."""
        return sum(layer.num_kept for layer in self.layers)

    @property
    def hash(self) -> str:
        """SHA-256 of everything in the plan, whatever its layout on disk."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """The plan as JSON text, one group to a line."""
        plain = json.loads(json.dumps(asdict(self), allow_nan=False))
        layers = plain.pop("layers")  # the longest part goes last
        head = {"format": FORMAT, "version": VERSION, **plain, "actual_experts": self.actual_experts}
        return format_json({**head, "layers": layers}) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "CompressionPlan":
        """Read a plan, however it was edited.

        ``actual_experts`` is counted anew, so that an edit of the groups need not keep it right.

        Raises:
            ValueError: Not JSON, another format or version, unknown or missing keys, values of another type,
                NaN or infinity, or contents that contradict each other; says what and where.
        """
        data = parse_json(text)
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise ValueError(f"it is not a compression plan: 'format' must be {FORMAT!r}")
        if (version := data.pop("version", None)) != VERSION:
            raise ValueError(
                f"its version is {version!r}; this moekit reads {VERSION}: update moekit or plan anew"
            )
        data.pop("actual_experts", None)
        _check_counts(data.get("layers"))
        return read_record(cls, data, "plan")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan as JSON, the whole file or none."""
        return write_atomically(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "CompressionPlan":
        """Read what `save` wrote, or an edited copy.

        Raises:
            ValueError: There is no such file, or `from_json` refuses it; names the file.
        """
        file = Path(path)
        if not file.is_file():
            raise ValueError(f"there is no plan at '{file}'")
        try:
            return cls.from_json(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"plan '{file}': {error}") from error

    def validate_against(self, layers: Sequence[Layer]) -> None:
        """Refuse a plan that does not fit a model; reads the model and changes nothing.

        Args:
            layers: ``expert_layers(model)``.

        Raises:
            ValueError: It is for another model, names a layer that is not there or leaves one out, or asks
                for what a layer's router cannot do. Says what, where and what is allowed.
        """
        check_unmerged(layers)
        here, found = ModelIdentity.of(layers), {layer.name: layer for layer in layers}
        for what in ("model_type", "layer_class"):
            if (planned := getattr(self.model, what)) != (got := getattr(here, what)):
                raise ValueError(
                    f"the plan is for another model: its {what} is {planned!r}, "
                    f"this one's is {got!r}; plan anew"
                )
        planned_names = [layer.name for layer in self.layers]
        if unknown := [name for name in planned_names if name not in found]:
            raise ValueError(f"the plan names layer {unknown[0]!r}, which is not among {', '.join(found)}")
        if missing := [name for name in found if name not in planned_names]:
            raise ValueError(
                f"the plan leaves out layer {missing[0]!r}; to keep it as it is, "
                "list each of its experts as a group of its own"
            )
        for planned in self.layers:
            self._check_layer(planned, found[planned.name])
        if self.model.fingerprint != here.fingerprint:
            raise ValueError(
                "the plan is for another model: its layers have the same names but experts of other shapes; "
                "plan anew"
            )

    def _check_layer(self, planned: LayerPlan, layer: Layer) -> None:
        for what in ("num_experts", "top_k"):
            if (wanted := getattr(planned, what)) != (got := getattr(layer, what)):
                raise ValueError(
                    f"the plan is for another model: {what}={wanted} in layer {layer.name!r}, "
                    f"which has {got}; plan anew"
                )
        if self.low_rank is not None:
            check_fits(self.low_rank, layer)
        if planned.is_identity:
            return
        if self.router in ("slice", "mean"):
            layer.check_removal(planned.cores)
        if self.router == "logsumexp":
            layer.router_constraints.check_group_probability(layer.name)
        if self.router == "constant":
            from ..moe.constants import check_constants  # which imports torch

            check_constants(layer)
        layer.check_replacement(planned.num_kept, planned.expert_map)

    @property
    def fate(self) -> str:
        """Of experts that are in no group, in a word."""
        return "constant" if self.router == "constant" else "removed"

    def summary(self) -> str:
        """A table for people: every layer with its groups, the core of each first."""
        rows = [
            (layer.name, f"{layer.num_experts} -> {layer.num_kept}", _groups(layer, self.fate))
            for layer in self.layers
        ]
        before = sum(layer.num_experts for layer in self.layers)
        widths = [max(len(row[column]) for row in (_HEADER, *rows)) for column in (0, 1)]
        lines = [
            f"{self.method} for {self.model.model_type}: {before} -> {self.actual_experts} experts "
            f"({self.requested_experts} requested), router {self.router}, form {self.form}",
            *(
                f"{name:<{widths[0]}}  {size:>{widths[1]}}  {groups}"
                for name, size, groups in (_HEADER, *rows)
            ),
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n".join(line.rstrip() for line in lines)


def _check_counts(layers: Any) -> None:
    """Refuse counts whose experts could not even be listed."""
    for index, layer in enumerate(layers if isinstance(layers, list) else ()):
        count = layer.get("num_experts") if isinstance(layer, dict) else None
        if isinstance(count, int) and count > MAX_EXPERTS:
            raise ValueError(f"plan.layers[{index}].num_experts is {count}, more than {MAX_EXPERTS:,}")


_HEADER = ("layer", "experts", "groups")
_SHOWN = 72


def _groups(layer: LayerPlan, fate: str) -> str:
    if layer.is_identity:
        return "as it is"
    shown = "  ".join(
        "+".join(str(e) for e in (group.core, *(e for e in group.experts if e != group.core)))
        for group in layer.groups
    )
    shown = shown if len(shown) <= _SHOWN else shown[: _SHOWN - 3].rstrip() + "..."
    return f"{shown}  ({len(layer.removed)} {fate})" if layer.removed else shown
