"""Put the neurons of one expert into the order of another's, without changing what the expert computes.

Shape letters: T tokens, D hidden (model) width, F FFN width, X features of one neuron.

An expert ``f(x) = down (act(gate x + b_g) * (up x + b_u)) + b_d`` stays the same function when one
permutation acts on the rows of ``gate`` and ``up`` (with their biases) and on the columns of ``down``.
Averaging experts makes sense only after such a permutation has brought like neurons together.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ..moe.weights import ExpertWeights


class Alignment(NamedTuple):
    """How to reorder an expert's neurons: ``aligned.up = signs * expert.up[permutation]``."""

    permutation: Tensor
    """[F] long: position i of the aligned expert takes neuron ``permutation[i]``."""
    signs: Tensor | None = None
    """[F], +1 or -1, factor on the up row and the down column of position i; None means all +1."""


@torch.no_grad()
def align_expert(
    expert: ExpertWeights,
    reference: ExpertWeights,
    *,
    include_down: bool = True,
    match_signs: bool = False,
) -> Alignment:
    """Find the neuron order in which an expert's weights agree best with a reference (weight matching).

    Maximises ``sum_i C[i, p(i)]`` over permutations p, with

        ``C = gate_ref gate^T + up_ref up^T + down_ref^T down + b_g,ref b_g^T + b_u,ref b_u^T``

    (terms that the expert does not have are left out; ``b_d`` belongs to no neuron). Cost: one F x 3D x F
    product in float32 and one linear assignment, O(F^3), on the CPU. Deterministic.

    Args:
        expert: The expert to reorder.
        reference: The expert whose order is kept; same layout.
        include_down: Count the down projection too; False matches only what enters the neuron.
        match_signs: Also use the sign symmetry of gated experts: an up row and its down column, both times
            -1, cancel. The joint up-and-down part of C then counts by its absolute value. Only for experts
            that are linear in ``up x + b_u``: **not** for GPT-OSS, which clamps it and adds one.

    Returns:
        The alignment, for ``permute_expert``; ``signs`` is None unless ``match_signs``.

    Raises:
        ValueError: Different layouts, NaN or infinity in the weights, or ``match_signs`` for an expert
            without a gate.

    Reference: Li et al., "Merge, Then Compress" (MC-SMoE, ICLR 2024), section 3.1, arXiv:2310.01334; weight
    matching of Ainsworth et al., "Git Re-Basin" (ICLR 2023), arXiv:2209.04836.

    *Departs from the paper*: gated experts, biases and signs, which the release does not cover.
    """
    check_same_layout(expert, reference, "the expert", "its reference")
    if match_signs and expert.gate is None:
        raise ValueError("match_signs=True needs gated experts, got one without a gate; set it to False")
    if not match_signs:
        score_FF = _neurons(reference, include_down) @ _neurons(expert, include_down).T
        return Alignment(_best_assignment(score_FF).to(expert.up.device))
    gate_FF = _gate_neurons(reference) @ _gate_neurons(expert).T
    linear_FF = _linear_neurons(reference, include_down) @ _linear_neurons(expert, include_down).T
    permutation_F = _best_assignment(gate_FF + linear_FF.abs()).to(expert.up.device)
    matched_F = linear_FF.gather(1, permutation_F.unsqueeze(1)).squeeze(1)
    signs_F = torch.where(matched_F < 0, -1, 1).to(expert.up.dtype)
    return Alignment(permutation_F, signs_F)


@torch.no_grad()
def permute_expert(
    expert: ExpertWeights, permutation: Int[Tensor, " F"], signs: Float[Tensor, " F"] | None = None
) -> ExpertWeights:
    """Reorder an expert's neurons; the function it computes stays exactly the same.

    ``up[p], gate[p], down[:, p]`` and the biases of up and gate likewise. The weights are copied unrounded;
    outputs can differ only by the order in which a matrix product adds.

    Args:
        expert: The expert; it is not changed.
        permutation: [F] long, holding every neuron once.
        signs: [F] of +1 and -1 for the up rows and down columns, for gated experts (see ``align_expert``).

    Returns:
        A new expert that shares no neuron weights with the old one (``down_bias`` is the same tensor).

    Raises:
        ValueError: ``permutation`` is no permutation of the F neurons, or signs for an expert without a gate.
    """
    width = expert.width
    permutation = permutation.to(expert.up.device)
    if not torch.equal(permutation.sort().values, torch.arange(width, device=permutation.device)):
        raise ValueError(
            f"permutation must hold each of the {width} neurons once, got {permutation.numel()} entries"
        )
    up, down = expert.up[permutation], expert.down[:, permutation]
    up_bias = _rows(expert.up_bias, permutation)
    if signs is not None:
        if expert.gate is None:
            raise ValueError("signs need gated experts, got one without a gate; leave signs out")
        signs = signs.to(up)
        up, down = up * signs.unsqueeze(1), down * signs
        up_bias = None if up_bias is None else up_bias * signs
    return ExpertWeights(
        up=up,
        down=down,
        gate=_rows(expert.gate, permutation),
        up_bias=up_bias,
        gate_bias=_rows(expert.gate_bias, permutation),
        down_bias=expert.down_bias,
    )


@torch.no_grad()
def activation_permutation(
    reference_hidden_TF: Float[Tensor, "T F"],
    hidden_TF: Float[Tensor, "T F"],
    score_FF: Float[Tensor, "F F"] | None = None,
) -> Int[Tensor, " F"]:
    """Find the neuron order in which activations correlate best with a reference's (activation matching).

    C is the F x F correlation of the activations (what enters ``down``) of both experts on the same tokens. A
    unit that never changes correlates 0 with every other. With at most one token there is no correlation and
    the identity is returned.

    Args:
        reference_hidden_TF: Activations of the reference on tokens routed to either expert.
        hidden_TF: Activations of the expert to reorder on the same tokens.
        score_FF: What else speaks for matching two neurons, the reference's in rows; is added to C.

    Returns:
        [F] long permutation for ``permute_expert``.

    Raises:
        ValueError: Shapes differ, or NaN or infinity among the activations.

    Reference: Li et al. (MC-SMoE, ICLR 2024), section 3.1 and appendix, arXiv:2310.01334.
    """
    got, wanted = tuple(hidden_TF.shape), tuple(reference_hidden_TF.shape)
    if got != wanted:
        raise ValueError(f"activations of shapes {got} and {wanted}; run both experts on the same tokens")
    if hidden_TF.shape[0] > 1:
        correlation_FF = _standardise(reference_hidden_TF).T @ _standardise(hidden_TF)
        score_FF = correlation_FF if score_FF is None else correlation_FF + score_FF
    if score_FF is None:
        return torch.arange(hidden_TF.shape[1], device=hidden_TF.device)
    return _best_assignment(score_FF).to(hidden_TF.device)


def neuron_cosines(reference: ExpertWeights, expert: ExpertWeights) -> Float[Tensor, "F F"]:
    """Cosine of all weights of every two neurons, the reference's in rows."""
    mine, theirs = (_neurons(item, include_down=True) for item in (reference, expert))
    return nn.functional.normalize(mine, dim=1) @ nn.functional.normalize(theirs, dim=1).T


def check_same_layout(
    expert: ExpertWeights, reference: ExpertWeights, name: str, reference_name: str
) -> None:
    """Refuse two experts that cannot be compared neuron by neuron.

    Args:
        expert: One expert.
        reference: The expert it must look like.
        name: What the message calls the first.
        reference_name: What the message calls the second.

    Raises:
        ValueError: They differ in a shape, a dtype, or in which matrices and biases they have.
    """
    got, wanted = (
        {key: f"{list(tensor.shape)} {tensor.dtype}" for key, tensor in item.named_tensors()}
        for item in (expert, reference)
    )
    if got != wanted:
        raise ValueError(
            f"{name} and {reference_name} have different layouts: {got} and {wanted}; "
            "only experts of one layer match"
        )


def _neurons(expert: ExpertWeights, include_down: bool) -> Tensor:
    """All weights of each neuron side by side, [F, X]: their inner products are C."""
    return torch.cat([_gate_neurons(expert), _linear_neurons(expert, include_down)], dim=1)


def _gate_neurons(expert: ExpertWeights) -> Tensor:
    return _columns(expert, [expert.gate, expert.gate_bias])


def _linear_neurons(expert: ExpertWeights, include_down: bool) -> Tensor:
    return _columns(expert, [expert.up, expert.up_bias, expert.down.T if include_down else None])


def _columns(expert: ExpertWeights, parts: list[Tensor | None]) -> Tensor:
    width, dtype = expert.width, torch.promote_types(expert.up.dtype, torch.float32)
    # The empty block keeps `cat` happy for experts without a gate.
    blocks = [expert.up.new_empty(width, 0, dtype=dtype)]
    return torch.cat(
        blocks + [part.reshape(width, -1).to(dtype) for part in parts if part is not None], dim=1
    )


def _rows(tensor: Tensor | None, permutation: Tensor) -> Tensor | None:
    return None if tensor is None else tensor[permutation]


def _standardise(hidden_TF: Tensor) -> Tensor:
    """Columns of mean 0 and length 1; constant columns become 0."""
    hidden_TF = hidden_TF.to(torch.promote_types(hidden_TF.dtype, torch.float32))
    # Subtracting a rounded mean leaves noise in a constant column, so constancy is judged before.
    constant_F = hidden_TF.amax(dim=0) == hidden_TF.amin(dim=0)
    centred_TF = (hidden_TF - hidden_TF.mean(dim=0)).masked_fill(constant_F, 0.0)
    lengths_F = centred_TF.norm(dim=0)
    return centred_TF / torch.where(lengths_F == 0, 1.0, lengths_F)


def _best_assignment(score_FF: Tensor) -> Tensor:
    if not score_FF.isfinite().all():
        raise ValueError(
            "cannot align: the weights or activations hold NaN or infinity; check the checkpoint"
        )
    _, columns_F = linear_sum_assignment(score_FF.cpu().numpy(), maximize=True)
    return torch.as_tensor(columns_F, dtype=torch.long)
