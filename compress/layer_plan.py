"""What becomes of one MoE layer: groups of experts, what they weigh, who leads them. Plain data, no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

_SUM_TOLERANCE = 1e-3  # so that a person may write 0.333 three times


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertGroup:
    """Experts that become one."""

    experts: tuple[int, ...]
    """Members, logical ids."""
    weights: tuple[float, ...]
    """Share of each member in the merged expert; they sum to 1."""
    core: int
    """The member whose router row stands for the group under ``slice`` and ``mean``."""
    reference: int
    """The expert of the layer whose neuron order the members take; need not be a member."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerPlan:
    """What becomes of one MoE layer; the merged experts stand in the order of the groups."""

    name: str
    """``ExpertLayer.name``."""
    num_experts: int
    """E before."""
    top_k: int
    """K, which the plan must leave the router enough groups for."""
    groups: tuple[ExpertGroup, ...]
    """M groups. An expert in none of them is removed."""

    def __post_init__(self) -> None:
        """Refuse groups that are not groups of this layer's experts."""
        where, allowed = f"(layer {self.name!r})", range(self.num_experts)
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k={self.top_k} is not between 1 and {self.num_experts} experts {where}")
        if len(self.groups) < self.top_k:
            raise ValueError(
                f"{len(self.groups)} groups are fewer than top_k={self.top_k} {where}: the router must find "
                f"top_k of them; make at least {self.top_k}"
            )
        group_of: dict[int, int] = {}
        for index, group in enumerate(self.groups):
            _check_group(group, f"group {index}", allowed, where)
            for expert in group.experts:
                if expert in group_of:
                    raise ValueError(
                        f"expert {expert} is in groups {group_of[expert]} and {index} {where}; choose one"
                    )
                group_of[expert] = index

    @property
    def num_kept(self) -> int:
        """M, the experts after."""
        return len(self.groups)

    @property
    def removed(self) -> list[int]:
        """Experts in no group."""
        kept = {expert for group in self.groups for expert in group.experts}
        return [expert for expert in range(self.num_experts) if expert not in kept]

    @property
    def cores(self) -> list[int]:
        """The core of every group."""
        return [group.core for group in self.groups]

    @property
    def group_of(self) -> list[int | None]:
        """For each of the E experts its group; ``None`` for a removed one."""
        found = {expert: index for index, group in enumerate(self.groups) for expert in group.experts}
        return [found.get(expert) for expert in range(self.num_experts)]

    @property
    def expert_map(self) -> list[int]:
        """For each of the E experts the merged expert that serves it.

        Removed experts are spread over all groups: only tables that name experts for a token (hash routing)
        ever ask for one.
        """
        return [e % self.num_kept if group is None else group for e, group in enumerate(self.group_of)]

    @property
    def is_identity(self) -> bool:
        """Whether every expert stays as it is, where it is."""
        return [group.experts for group in self.groups] == [(e,) for e in range(self.num_experts)]


def keep_experts(name: str, num_experts: int, top_k: int, keep: Sequence[int] | None = None) -> LayerPlan:
    """Plan a layer in which some experts (all by default) stay as they are and the others go."""
    keep = range(num_experts) if keep is None else keep
    groups = tuple(ExpertGroup(experts=(e,), weights=(1.0,), core=e, reference=e) for e in keep)
    return LayerPlan(name=name, num_experts=num_experts, top_k=top_k, groups=groups)


def _check_group(group: ExpertGroup, what: str, allowed: range, where: str) -> None:
    """Raises ValueError unless the group could be one of a layer with the experts `allowed`."""
    if not group.experts:
        raise ValueError(f"{what} is empty {where}; give it an expert or take it out")
    for role, ids in (("expert", group.experts), ("reference", (group.reference,))):
        if outside := [e for e in ids if e not in allowed]:
            raise ValueError(f"{role} {outside[0]} of {what} is not between 0 and {allowed[-1]} {where}")
    if len(group.weights) != len(group.experts):
        raise ValueError(f"{what} has {len(group.experts)} experts but {len(group.weights)} weights {where}")
    if any(not math.isfinite(w) or w < 0 for w in group.weights):
        raise ValueError(f"weights {list(group.weights)} of {what} must be finite and not negative {where}")
    if abs(sum(group.weights) - 1) > _SUM_TOLERANCE:
        raise ValueError(
            f"weights {list(group.weights)} of {what} sum to {sum(group.weights):g}, not 1 {where}"
        )
    if group.core not in group.experts:
        raise ValueError(
            f"core {group.core} of {what} is not one of its experts {list(group.experts)} {where}"
        )
