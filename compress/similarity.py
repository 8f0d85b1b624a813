"""How alike two experts are: the [E, E] matrices that grouping reads.

Shape letters: E experts, D hidden (model) width, F FFN width, X elements of one chunk of weights.
Every function returns a symmetric float64 matrix with ones on its diagonal. Only the order of its entries
matters to grouping, so a measure may be rescaled freely.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Real
from torch import Tensor

from ..moe.weights import ExpertWeights
from .alignment import check_same_layout

# 4M float32 elements (16 MB) are enough for an efficient matrix product and small beside any expert layer.
CHUNK_ELEMENTS = 1 << 22


def router_logit_similarity(logit_gram_EE: Real[Tensor, "E E"]) -> Float[Tensor, "E E"]:
    """Similarity of the router logits that two experts receive over the same tokens, as in M-SMoE.

    ``s_ij = (cos(h_i, h_j) + 1) / 2``, where ``h_i`` holds expert i's logit for every calibration token. The
    cosine needs only the Gram matrix, ``G_ij / sqrt(G_ii G_jj)``. An expert whose logits are all zero has
    cosine 0, that is similarity 1/2, to every other expert.

    Args:
        logit_gram_EE: ``sum_t h_t h_t^T`` over the tokens (``LayerStatistics.logit_gram``).

    Returns:
        Similarities in [0, 1].

    Raises:
        ValueError: The matrix is not square, holds NaN or infinity, or has a negative diagonal entry.

    Reference: Li et al., "Merge, Then Compress" (MC-SMoE, ICLR 2024), section 3.1, arXiv:2310.01334.

    *Departs from the paper*: the released code counts padding tokens; the statistics given here should not.
    """
    return (_cosine(logit_gram_EE) + 1) / 2


@torch.no_grad()
def weight_similarity(experts: Sequence[ExpertWeights]) -> Float[Tensor, "E E"]:
    """Cosine of the flattened weights (all matrices and biases) of every two experts of a layer.

    Neuron order matters here although it does not matter to the expert's function, so align the experts to
    one reference first (``align_expert``, ``permute_expert``); unaligned experts all look equally unlike. The
    Gram matrix is accumulated over chunks of rows, so extra memory is a few chunks and not a copy of the
    layer.

    Args:
        experts: The E experts of one layer, all of one layout, dtype and device.

    Returns:
        Cosines in [-1, 1], on the experts' device. An expert whose weights are all zero has cosine 0 to the
        others.

    Raises:
        ValueError: No expert, experts of different layouts, or weights with NaN or infinity.

    Reference: similarity base "weight" of Li et al. (MC-SMoE, ICLR 2024), arXiv:2310.01334, extended to gates
    and biases.
    """
    if not experts:
        raise ValueError("got no experts; weight_similarity needs at least one")
    for index, expert in enumerate(experts):
        check_same_layout(expert, experts[0], f"expert {index}", "expert 0")
    num_experts = len(experts)
    gram_EE = torch.zeros(num_experts, num_experts, dtype=torch.float64, device=experts[0].up.device)
    parts = [dict(expert.named_tensors()) for expert in experts]
    for name, first in parts[0].items():
        compute_dtype = torch.promote_types(first.dtype, torch.float32)
        rows = max(1, CHUNK_ELEMENTS // (num_experts * first[0].numel()))
        for start in range(0, first.shape[0], rows):
            chunk_EX = torch.stack([part[name][start : start + rows].flatten() for part in parts])
            chunk_EX = chunk_EX.to(compute_dtype)
            gram_EE += (chunk_EX @ chunk_EX.T).double()
    return _cosine(gram_EE)


def output_similarity(
    output_sums_ED: Float[Tensor, "E D"], counts_E: Real[Tensor, " E"]
) -> Float[Tensor, "E E"]:
    """Cosine of the experts' mean outputs over the tokens that each of them served.

    A cosine does not see the division by the token count, so the sums do. Experts without tokens have
    similarity 0 to all but themselves.

    Args:
        output_sums_ED: Sum of ``f_e(x)`` over the tokens routed to expert e
            (``LayerStatistics.output_sums``).
        counts_E: Tokens routed to each expert.

    Returns:
        Cosines in [-1, 1].

    Raises:
        ValueError: Sums and counts of different numbers of experts, NaN or infinity among the sums.

    Reference: similarity base "feature" of Li et al. (MC-SMoE, ICLR 2024), arXiv:2310.01334.

    *Departs from the paper*: the release compares outputs token by token on common inputs; mean outputs need
    no second pass and no token-by-expert tensor.
    """
    if output_sums_ED.shape[0] != counts_E.shape[0]:
        raise ValueError(
            f"output sums of {output_sums_ED.shape[0]} experts but counts of {counts_E.shape[0]}; "
            "take both from the statistics of one layer"
        )
    used_E1 = (counts_E > 0).unsqueeze(1).to(output_sums_ED.device)
    served_ED = output_sums_ED.double().masked_fill(~used_E1, 0.0)
    return _cosine(served_ED @ served_ED.T)


# What each one reads: the logit Gram matrix; the experts; the output sums and the counts.
SIMILARITIES: dict[str, Callable[..., Tensor]] = {
    "router-logits": router_logit_similarity,
    "weights": weight_similarity,
    "outputs": output_similarity,
}


def _cosine(gram_EE: Tensor) -> Tensor:
    """Cosines from a Gram matrix; a vector of length zero is orthogonal to all but itself."""
    if gram_EE.ndim != 2 or gram_EE.shape[0] != gram_EE.shape[1]:
        raise ValueError(
            f"got a Gram matrix of shape {tuple(gram_EE.shape)}; it must be square, experts by experts"
        )
    gram_EE = gram_EE.double()
    squares_E = gram_EE.diagonal()
    if not gram_EE.isfinite().all() or (squares_E < 0).any():
        raise ValueError(
            "the Gram matrix holds NaN, infinity or a negative diagonal entry; "
            "look for NaN in the model's weights or in its router logits"
        )
    norms_E = squares_E.sqrt()
    products_EE = torch.outer(norms_E, norms_E)
    cosine_EE = torch.where(products_EE > 0, gram_EE / products_EE.clamp_min(1e-300), 0.0)
    cosine_EE = ((cosine_EE + cosine_EE.T) / 2).clamp(-1.0, 1.0)
    return cosine_EE.fill_diagonal_(1.0)
