"""Which experts become one: how many groups each layer gets, who leads them, who joins whom.

Shape letters: L layers, E experts of a layer, M groups of a layer, P experts of all layers pooled.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

TIES = ("exact", "strict")


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupCounts:
    """How many groups each layer gets."""

    num_groups: tuple[int, ...]
    """Groups M of every layer, in the order of the layers; E for excluded layers."""
    requested: int
    """Groups asked for over all layers, those of excluded layers included."""

    @property
    def actual(self) -> int:
        """Groups given over all layers; below ``requested`` only for ``ties="strict"``."""
        return sum(self.num_groups)


def adaptive_group_counts(
    usage_LE: Sequence[Tensor],
    average_groups: float | int,
    *,
    excluded: Collection[int] = (),
    minimum: int = 1,
    ties: str = "exact",
) -> GroupCounts:
    """Share out groups over the layers: layers that use many experts keep many (M-SMoE's adaptive rule).

    Each layer's counts become shares of sum 1; the ``minimum`` most used experts of a layer, and all experts
    of an excluded one, get the share 1. All shares are pooled and the largest ``average_groups * merged
    layers + experts of excluded layers`` decide: a layer gets as many groups as it has experts among them.

    Args:
        usage_LE: Per layer, how often each of its E experts was selected; E may differ. A layer nobody used
            counts as all zeros.
        average_groups: Mean number of groups per merged layer, between ``minimum`` and E; need not be whole,
            the total is rounded.
        excluded: Indices of layers that keep all their experts.
        minimum: Fewest groups of any merged layer; use ``max(1, top_k)`` for a router that must find top_k of
            them.
        ties: ``"exact"`` ranks equal shares by (layer, expert id), lower first, so that the total is met
            exactly. ``"strict"`` is the published rule: experts strictly above the first share left out, so
            ties and unused experts at the threshold give fewer groups than asked.

    Returns:
        Groups per layer, with the requested and the actual total.

    Raises:
        ValueError: Counts that are negative, NaN or empty; an average, a minimum, an excluded index or
            ``ties`` out of range.

    Reference: Li et al., "Merge, Then Compress" (MC-SMoE, ICLR 2024), section 3.1 and algorithm 1,
    arXiv:2310.01334.

    *Departs from the paper*: ``ties="exact"`` and ``minimum`` above 1. The release fails or loses a group
    when every expert is to be kept; here that is allowed.
    """
    sizes = [counts_E.numel() for counts_E in usage_LE]
    merged = _merged_layers(sizes, excluded, minimum)
    allowed = sum(sizes[layer] for layer in merged) / max(1, len(merged))
    if merged and not minimum <= average_groups <= allowed:
        raise ValueError(
            f"average_groups={average_groups} is not between {minimum} and {allowed:g}, "
            "the fewest groups and the mean number of experts of the merged layers"
        )
    if ties not in TIES:
        raise ValueError(f"ties={ties!r} is not one of {', '.join(TIES)}")
    requested = round(average_groups * len(merged)) + sum(sizes) - sum(sizes[layer] for layer in merged)
    pooled_P = torch.cat(
        [
            _shares(checked_counts(counts_E, f"layer {layer}"), minimum if layer in merged else sizes[layer])
            for layer, counts_E in enumerate(usage_LE)
        ]
    )
    ranking_P = torch.argsort(pooled_P, descending=True, stable=True)
    if ties == "exact" or requested == len(pooled_P):
        kept_P = torch.zeros(len(pooled_P), dtype=torch.bool).index_fill_(0, ranking_P[:requested], True)
    else:
        kept_P = pooled_P > pooled_P[ranking_P[requested]]
    num_groups = tuple(int(kept_E.sum()) for kept_E in kept_P.split(sizes))
    return GroupCounts(num_groups=num_groups, requested=requested)


def uniform_group_counts(
    num_experts: Sequence[int], num_groups: int, *, excluded: Collection[int] = (), minimum: int = 1
) -> GroupCounts:
    """Give every merged layer the same number of groups.

    Args:
        num_experts: Experts E of every layer.
        num_groups: Groups M of every merged layer, between ``minimum`` and E.
        excluded: Indices of layers that keep all their experts.
        minimum: Fewest groups allowed; use ``max(1, top_k)``.

    Returns:
        Groups per layer; ``requested`` equals ``actual``.

    Raises:
        ValueError: ``num_groups``, ``minimum`` or an excluded index out of range.
    """
    merged = _merged_layers(num_experts, excluded, minimum)
    for layer in merged:
        if not minimum <= num_groups <= num_experts[layer]:
            raise ValueError(
                f"num_groups={num_groups} is not between {minimum} and {num_experts[layer]} experts "
                f"(layer {layer})"
            )
    counts = tuple(num_groups if layer in merged else size for layer, size in enumerate(num_experts))
    return GroupCounts(num_groups=counts, requested=sum(counts))


def dominant_experts(counts_E: Real[Tensor, " E"], num_groups: int) -> Int[Tensor, " M"]:
    """The most used experts of a layer, which lead its groups; expert ``dominant[m]`` leads group m.

    Args:
        counts_E: How often each expert was selected.
        num_groups: Groups M, between 1 and E.

    Returns:
        [M] long expert ids, ascending. Of equally used experts the lower id leads.

    Raises:
        ValueError: ``num_groups`` out of range, or counts that are negative, NaN or empty.

    Reference: Li et al. (MC-SMoE, ICLR 2024), section 3.1, arXiv:2310.01334.

    *Departs from the paper*: the release numbers the groups by use. Labels carry no meaning, and ascending
    ids make M = E the identity without reordering the experts.
    """
    ranking_E = _by_use(checked_counts(counts_E))
    if not 1 <= num_groups <= len(ranking_E):
        raise ValueError(f"num_groups={num_groups} is not between 1 and {len(ranking_E)} experts")
    return torch.tensor(sorted(ranking_E[:num_groups]))


def assign_groups(
    similarity_EE: Float[Tensor, "E E"],
    counts_E: Real[Tensor, " E"],
    dominant: Sequence[int] | Int[Tensor, " M"],
    *,
    capacity: int | None = None,
    alone: Collection[int] = (),
) -> Int[Tensor, " E"]:
    """Let every other expert join the dominant expert that it resembles most.

    The others choose in descending order of use (ties: lower id first), which matters only under a capacity.
    Among equally similar dominant experts the most used one wins, then the lower id.

    Args:
        similarity_EE: Similarity of every two experts; row e is read for expert e.
        counts_E: How often each expert was selected.
        dominant: M distinct expert ids; ``dominant[m]`` leads group m.
        capacity: Most members of a group, its leader included; None for no limit. M groups must hold all E
            experts.
        alone: Dominant experts that nobody joins.

    Returns:
        [E] long, the group of every expert.

    Raises:
        ValueError: Sizes that do not agree, NaN or infinity among the similarities, bad counts, dominant ids
            out of range or twice, or groups too small for all experts.

    Reference: Li et al. (MC-SMoE, ICLR 2024), section 3.1, arXiv:2310.01334.

    *Departs from the paper*: every expert is assigned. The published uniform grouping walks over expert ids
    M..E-1 instead of places in the ranking by use, so about M(1 - M/E) experts (6 of 32 for M = 8) keep a
    meaningless initial label, and its decoder branch never applies the capacity.
    """
    counts_E = checked_counts(counts_E)
    num_experts, leaders = len(counts_E), torch.as_tensor(dominant).tolist()
    if similarity_EE.shape != (num_experts, num_experts):
        raise ValueError(
            f"similarity of shape {tuple(similarity_EE.shape)} for counts of {num_experts} experts; "
            "take both from one layer"
        )
    if not similarity_EE.isfinite().all():
        raise ValueError("the similarities hold NaN or infinity; check the calibration statistics")
    check_distinct_ids(leaders, num_experts)
    capacity = num_experts if capacity is None else capacity
    if capacity * len(leaders) < num_experts:
        raise ValueError(
            f"capacity={capacity} is too small for {num_experts} experts in {len(leaders)} groups; "
            f"allow at least {-(-num_experts // len(leaders))}"
        )
    group_of = {leader: label for label, leader in enumerate(leaders)}
    ranking = _by_use(counts_E)
    labels_by_use = [group_of[expert] for expert in ranking if expert in group_of and expert not in alone]
    sizes, rows = [1] * len(leaders), similarity_EE.tolist()
    for expert in ranking:
        if expert in group_of:
            continue
        free = [label for label in labels_by_use if sizes[label] < capacity]
        if not free:
            raise ValueError(
                f"{len(leaders)} groups of at most {capacity}, {len(alone)} of them closed, do not hold "
                f"{num_experts} experts; keep more experts"
            )
        # `max` keeps the first of equals: the group whose leader is used most.
        best = max(free, key=lambda label, row=rows[expert]: row[leaders[label]])
        group_of[expert] = best
        sizes[best] += 1
    return torch.tensor([group_of[expert] for expert in range(num_experts)])


def random_groups(num_experts: int, num_groups: int, seed: int) -> Int[Tensor, " E"]:
    """Groups drawn at random, none of them empty: the ablation every grouping must beat.

    Args:
        num_experts: Experts E.
        num_groups: Groups M, between 1 and E.
        seed: The same seed gives the same groups; use another one for each layer.

    Returns:
        [E] long, the group of every expert. ``most_used_members`` names the leaders.

    Raises:
        ValueError: ``num_groups`` is not between 1 and E.

    Reference: "random grouping" in the ablations of Li et al. (MC-SMoE, ICLR 2024), arXiv:2310.01334.
    """
    if not 1 <= num_groups <= num_experts:
        raise ValueError(f"num_groups={num_groups} is not between 1 and {num_experts} experts")
    generator = torch.Generator().manual_seed(seed)
    order_E = torch.randperm(num_experts, generator=generator)
    group_of_E = torch.empty(num_experts, dtype=torch.long)
    group_of_E[order_E[:num_groups]] = torch.arange(num_groups)
    group_of_E[order_E[num_groups:]] = torch.randint(
        num_groups, (num_experts - num_groups,), generator=generator
    )
    return group_of_E


def most_used_members(group_of_E: Int[Tensor, " E"], counts_E: Real[Tensor, " E"]) -> Int[Tensor, " M"]:
    """The most used expert of every group (ties: lower id), for groups that were not built around leaders.

    Args:
        group_of_E: Group of every expert, labels 0..M-1, none of them empty.
        counts_E: How often each expert was selected.

    Returns:
        [M] long expert ids.

    Raises:
        ValueError: An empty group or a label out of range, or bad counts.
    """
    position = {expert: place for place, expert in enumerate(_by_use(checked_counts(counts_E)))}
    if len(position) != len(group_of_E):
        raise ValueError(f"groups of {len(group_of_E)} experts but counts of {len(position)}")
    members = group_members(group_of_E, int(group_of_E.max()) + 1)
    return torch.tensor([min(group, key=position.__getitem__) for group in members])


def group_members(group_of_E: Int[Tensor, " E"], num_groups: int) -> list[list[int]]:
    """List the members of every group, ids ascending.

    Args:
        group_of_E: Group of every expert.
        num_groups: Groups M.

    Returns:
        M lists of expert ids.

    Raises:
        ValueError: A label outside 0..M-1, or a group without members.
    """
    members: list[list[int]] = [[] for _ in range(num_groups)]
    for expert, label in enumerate(group_of_E.tolist()):
        if not 0 <= label < num_groups:
            raise ValueError(
                f"expert {expert} is in group {label}, which is not between 0 and {num_groups - 1}"
            )
        members[label].append(expert)
    if [] in members:
        raise ValueError(f"group {members.index([])} of {num_groups} is empty; every group needs a member")
    return members


def check_distinct_ids(expert_ids: Sequence[int], num_experts: int) -> None:
    """Refuse a list of dominant experts that is empty, repeats an id or leaves 0..E-1.

    Args:
        expert_ids: The ids.
        num_experts: Experts E of the layer.

    Raises:
        ValueError: As described.
    """
    in_range = all(0 <= expert < num_experts for expert in expert_ids)
    if not expert_ids or not in_range or len(set(expert_ids)) != len(expert_ids):
        raise ValueError(
            f"dominant experts {list(expert_ids)} must be distinct ids between 0 and {num_experts - 1}"
        )


def checked_counts(counts_E: Real[Tensor, " E"], where: str = "the layer") -> Float[Tensor, " E"]:
    """Usage counts as float64 on the CPU.

    Args:
        counts_E: How often each expert was selected; any non-negative weights will do.
        where: What the message calls their layer.

    Returns:
        The same numbers.

    Raises:
        ValueError: Not a vector, empty, negative, NaN or infinite.
    """
    counts_E = counts_E.detach().double().cpu()
    if counts_E.ndim != 1 or not counts_E.numel():
        raise ValueError(
            f"counts of {where} have shape {tuple(counts_E.shape)}; they must be one number per expert"
        )
    if not counts_E.isfinite().all() or (counts_E < 0).any():
        raise ValueError(f"counts of {where} hold negative, NaN or infinite numbers: {counts_E.tolist()}")
    return counts_E


def _by_use(counts_E: Tensor) -> list[int]:
    return torch.argsort(counts_E, descending=True, stable=True).tolist()


def _shares(counts_E: Tensor, num_pinned: int) -> Tensor:
    """Shares of use in a layer, with the most used experts set to 1."""
    shares_E = counts_E / counts_E.sum().clamp_min(torch.finfo(torch.float64).tiny)
    shares_E[_by_use(counts_E)[:num_pinned]] = 1.0
    return shares_E


def _merged_layers(sizes: Sequence[int], excluded: Collection[int], minimum: int) -> list[int]:
    outside = sorted(set(excluded) - set(range(len(sizes))))
    if outside:
        raise ValueError(f"excluded layers {outside} do not exist; there are layers 0 to {len(sizes) - 1}")
    merged = [layer for layer in range(len(sizes)) if layer not in excluded]
    for layer in merged:
        if not 1 <= minimum <= sizes[layer]:
            raise ValueError(f"minimum={minimum} is not between 1 and {sizes[layer]} experts (layer {layer})")
    return merged
