"""Make one expert of several: the weighted sum of their matrices, after alignment.

Shape letters: E experts of a layer, M groups of a layer, N members of a group, F FFN width.
"""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

from ..moe.weights import ExpertWeights
from .alignment import Alignment, align_expert, check_same_layout, permute_expert
from .grouping import checked_counts, group_members

WEIGHTINGS = ("frequency", "equal")
REFERENCES = ("dominant", "first")


@torch.no_grad()
def merge_experts(
    experts: Iterable[ExpertWeights], weights: Sequence[float | int] | Real[Tensor, " N"]
) -> ExpertWeights:
    """Weighted mean of experts: ``W = sum_n a_n W_n / sum_n a_n`` for every matrix and bias.

    The experts are read one after the other and only the sum is kept, in float32 (float64 for float64
    experts), so a generator of aligned copies needs memory for one of them. Experts of weight 0 are not read
    into the sum, and one expert alone comes back bit for bit.

    Args:
        experts: N experts of one layout.
        weights: N non-negative numbers, any scale. All zeros count as all equal.

    Returns:
        A new expert in the dtype of the inputs, sharing no memory with them.

    Raises:
        ValueError: No expert, other numbers of experts and weights, experts of different layouts, or weights
            that are negative, NaN or infinite.

    Reference: Li et al., "Merge, Then Compress" (MC-SMoE, ICLR 2024), section 3.1, arXiv:2310.01334.

    *Departs from the paper*: for members that were never used the release yields an all-zero expert.
    """
    shares = _normalise(checked_counts(torch.as_tensor(weights), "the merge")).tolist()
    layout: ExpertWeights | None = None
    sums: dict[str, Tensor] = {}
    num_read = 0
    for expert in experts:
        layout = _without_data(expert) if layout is None else layout
        check_same_layout(expert, layout, f"expert {num_read}", "expert 0")
        num_read += 1
        if num_read > len(shares):
            break
        _accumulate(sums, expert, shares[num_read - 1])
        # Or it would live until the generator has made the next one.
        del expert
    if layout is None or num_read != len(shares):
        raise ValueError(f"got {len(shares)} weights for {num_read} experts; each expert needs one weight")
    return ExpertWeights(**{name: sums[name].to(tensor.dtype) for name, tensor in layout.named_tensors()})


def group_weights(
    group_of_E: Int[Tensor, " E"], counts_E: Real[Tensor, " E"], *, weighting: str = "frequency"
) -> Float[Tensor, " E"]:
    """The share of every expert in the merged expert of its group; the shares of a group sum to 1.

    Args:
        group_of_E: Group of every expert, labels 0..M-1, none of them empty.
        counts_E: How often each expert was selected.
        weighting: ``"frequency"`` weighs by counts, ``"equal"`` not at all. In a group that nobody used all
            members weigh the same.

    Returns:
        [E] float64 in [0, 1].

    Raises:
        ValueError: An empty group, a label out of range, bad counts or an unknown weighting.

    Reference: Li et al. (MC-SMoE, ICLR 2024), section 3.1, arXiv:2310.01334 (activation-frequency weights).
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting={weighting!r} is not one of {', '.join(WEIGHTINGS)}")
    counts_E = checked_counts(counts_E)
    if len(group_of_E) != len(counts_E):
        raise ValueError(f"groups of {len(group_of_E)} experts but counts of {len(counts_E)}")
    weights_E = counts_E if weighting == "frequency" else torch.ones_like(counts_E)
    shares_E = torch.empty_like(weights_E)
    for members in group_members(group_of_E, int(group_of_E.max()) + 1):
        shares_E[members] = _normalise(weights_E[members])
    return shares_E


def merge_groups(
    experts: Sequence[ExpertWeights],
    group_of_E: Int[Tensor, " E"],
    counts_E: Real[Tensor, " E"],
    dominant: Sequence[int] | Int[Tensor, " M"],
    *,
    weighting: str = "frequency",
    align: bool = True,
    reference: str = "dominant",
    alignments: Sequence[Alignment] | None = None,
) -> list[ExpertWeights]:
    """Merge every group of a layer into one expert.

    Groups of one come back bit for bit. Experts whose weight is 0 are neither aligned nor read. Beside the
    results only one aligned copy, one float32 sum and what the alignment itself needs exist at a time.

    Args:
        experts: The E experts of the layer (views will do; they are not changed).
        group_of_E: Group of every expert, labels 0..M-1, none of them empty.
        counts_E: How often each expert was selected, or any non-negative weights.
        dominant: ``dominant[m]`` is a member of group m.
        weighting: ``"frequency"`` or ``"equal"``, see ``group_weights``.
        align: Align the members by weight matching before they are added.
        reference: Whose neuron order the members take: ``"dominant"``, their group's dominant expert, or
            ``"first"``, expert 0 of the layer, as in the paper.
        alignments: E alignments found in another way (activation matching, signs) to use instead of weight
            matching; members of one group must be aligned to one reference. ``align`` and ``reference`` are
            then not read.

    Returns:
        M new experts, in the order of the labels.

    Raises:
        ValueError: Lengths that do not agree, an empty group, a label or dominant expert out of place, bad
            counts, an unknown option, or experts of different layouts.

    Reference: Li et al., "Merge, Then Compress" (MC-SMoE, ICLR 2024), section 3.1 and algorithm 1,
    arXiv:2310.01334.

    *Departs from the paper*: the dominant expert as default reference, so that one that outweighs its group
    changes least; equal weights, not zeros, for groups that nobody used.
    """
    if reference not in REFERENCES:
        raise ValueError(f"reference={reference!r} is not one of {', '.join(REFERENCES)}")
    if len(experts) != len(group_of_E):
        raise ValueError(f"got {len(experts)} experts but groups for {len(group_of_E)}")
    if alignments is not None and len(alignments) != len(experts):
        raise ValueError(
            f"got {len(alignments)} alignments for {len(experts)} experts; each expert needs one"
        )
    shares = group_weights(group_of_E, counts_E, weighting=weighting).tolist()
    leaders = torch.as_tensor(dominant).tolist()
    groups = group_members(group_of_E, len(leaders))
    merged = []
    for label, (leader, members) in enumerate(zip(leaders, groups, strict=True)):
        if leader not in members:
            raise ValueError(f"dominant expert {leader} is not in group {label}, whose members are {members}")
        used = [member for member in members if shares[member] > 0]
        target = leader if reference == "dominant" else 0
        realign = len(used) > 1 and (align or alignments is not None)
        ordered = (
            _aligned(experts, member, target, alignments) if realign else experts[member] for member in used
        )
        merged.append(merge_experts(ordered, [shares[member] for member in used]))
    return merged


def _aligned(
    experts: Sequence[ExpertWeights], member: int, target: int, alignments: Sequence[Alignment] | None
) -> ExpertWeights:
    if alignments is not None:
        return permute_expert(experts[member], *alignments[member])
    if member == target:
        return experts[member]
    return permute_expert(experts[member], *align_expert(experts[member], experts[target]))


def _without_data(expert: ExpertWeights) -> ExpertWeights:
    return ExpertWeights(**{name: tensor.to("meta") for name, tensor in expert.named_tensors()})


def _accumulate(sums: dict[str, Tensor], expert: ExpertWeights, share: float) -> None:
    # An infinity in an expert that does not count would still make NaN of 0 * inf.
    if share == 0:
        return
    for name, tensor in expert.named_tensors():
        if name in sums:
            sums[name].add_(tensor, alpha=share)
        else:
            # Starting from zeros would lose the sign of a negative zero.
            sums[name] = tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * share


def _normalise(weights_N: Tensor) -> Tensor:
    total = weights_N.sum()
    return weights_N / total if total > 0 else torch.full_like(weights_N, 1 / len(weights_N))
