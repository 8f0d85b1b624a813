"""Which neurons of a dense FFN form which expert: each neuron in one expert, all experts of one width.

Neurons that belong together are found by k-means with clusters of equal size. Sizes being equal, it maximises
the sum of the inner products of all pairs of rows within a cluster. Where a row marks the tokens for which a
neuron fires, that is how often neurons of one expert fire together: CMoE's clustering and MoEfication's cut
of the co-activation graph into equal parts want the same. On one core it takes 0.3 s for F = 1,536 and 3 s
for F = 8,192 with 16 experts, 20 s for F = 14,336 with 64.
"""

# T tokens, F neurons of the dense FFN, E experts, I = F / E neurons of an expert, X entries of a row

from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..weights import ExpertWeights

MAX_ROUNDS = 50
"""Of k-means; it mostly ends by itself after 5 to 30."""
DIVISORS_SHOWN = 9


def check_divides(num_neurons: int, num_experts: int) -> None:
    """Refuse a number of experts that cannot be of equal width.

    Raises:
        ValueError: E does not divide F; names numbers that do.
    """
    if num_experts >= 1 and num_neurons % num_experts == 0:
        return
    divisors = [str(n) for n in range(2, num_neurons + 1) if num_neurons % n == 0]
    shown = divisors[:DIVISORS_SHOWN] + ["..."] * (len(divisors) > DIVISORS_SHOWN)
    raise ValueError(
        f"{num_experts} experts do not divide an FFN of width {num_neurons}; possible: {', '.join(shown)}"
    )


def contiguous_partition(num_neurons: int, num_experts: int) -> Int[Tensor, "E I"]:
    """Cut the neurons as they lie, as SMoE-Dropout does.

    Raises:
        ValueError: E does not divide F.

    Reference: Chen et al., Sparse MoE as the New Dropout (ICLR 2023), section 3, arXiv:2303.01610.
    """
    check_divides(num_neurons, num_experts)
    return torch.arange(num_neurons).view(num_experts, -1)


def random_partition(num_neurons: int, num_experts: int, seed: int = 0) -> Int[Tensor, "E I"]:
    """Deal the neurons at random; they ascend within an expert.

    Raises:
        ValueError: E does not divide F.

    Reference: Zhu et al., LLaMA-MoE (EMNLP 2024), "independent random", arXiv:2406.16554.
    """
    check_divides(num_neurons, num_experts)
    order_F = torch.randperm(num_neurons, generator=torch.Generator().manual_seed(seed))
    return order_F.view(num_experts, -1).sort(dim=1).values


def weight_partition(weights: ExpertWeights, num_experts: int, seed: int = 0) -> Int[Tensor, "E I"]:
    """Group neurons that read alike: balanced k-means on the unit rows of the gate (of up without a gate).

    Args:
        weights: The dense FFN.
        num_experts: E.
        seed: Of the first centroids.

    Returns:
        Neurons ascending within an expert, experts ascending by their first neuron.

    Raises:
        ValueError: E does not divide F, or the weights hold NaN or infinity.

    Reference: Zhang et al., MoEfication (Findings of ACL 2022), "parameter clustering split",
    arXiv:2110.01786; LLaMA-MoE's "clustering", arXiv:2406.16554.

    *Departs from the papers*: one start instead of the best of ten.
    """
    check_divides(weights.width, num_experts)
    rows_FD = (weights.up if weights.gate is None else weights.gate).detach().float().cpu()
    _check_finite(rows_FD, "weights")
    return _cluster(torch.nn.functional.normalize(rows_FD), num_experts, seed)


def coactivation_partition(
    activations_TF: Float[Tensor, "T F"], num_experts: int, seed: int = 0, *, num_active: int | None = None
) -> Int[Tensor, "E I"]:
    """Group neurons that fire together.

    A neuron fires for a token when it is among the `num_active` of the largest absolute activation and is not
    zero, so an FFN with ReLU and one with SwiGLU are treated alike.

    Args:
        activations_TF: What the down projection reads, for a sample of tokens.
        num_experts: E.
        seed: Of the first centroids.
        num_active: Neurons that fire for a token (K_a of CMoE); by default F / E, the width of one expert.

    Returns:
        Neurons ascending within an expert, experts ascending by their first neuron.

    Raises:
        ValueError: E does not divide F, there is no token, `num_active` is not between 1 and F, or the
            activations hold NaN or infinity.

    Reference: Pei et al., CMoE (ACL 2026), section 3, arXiv:2502.04416; MoEfication, "co-activation graph
    split", arXiv:2110.01786. The module says why the two are one objective.

    *Departs from the papers*: MoEfication weighs a pair by the product of its activations and cuts with
    METIS. CMoE lets 10 neurons fire, which in a short sample leaves many that never do, starts from the
    neurons that fire most and assigns once; here k-means++ starts, and it goes on until nothing changes.
    """
    num_neurons = activations_TF.shape[1]
    check_divides(num_neurons, num_experts)
    fires_FT = _fires(activations_TF, num_neurons // num_experts if num_active is None else num_active)
    return _cluster(fires_FT, num_experts, seed)


def shared_partition(
    activations_TF: Float[Tensor, "T F"],
    num_experts: int,
    num_shared: int,
    seed: int = 0,
    *,
    num_active: int | None = None,
) -> Int[Tensor, "E I"]:
    """Put the neurons that fire most into shared experts, which always run, and group the others.

    Args:
        activations_TF: What the down projection reads, for a sample of tokens.
        num_experts: E, shared and routed.
        num_shared: S, from 0 to E - 1.
        seed: Of the first centroids.
        num_active: As for `coactivation_partition`.

    Returns:
        First the S shared experts, by falling rate of their neurons; then E - S routed ones, ascending by
        their first neuron.

    Raises:
        ValueError: S is out of range, or what `coactivation_partition` refuses.

    Reference: CMoE, section 3, arXiv:2502.04416; equal rates fall to the lower neuron.

    *Departs from the paper*: as `coactivation_partition`.
    """
    num_neurons = activations_TF.shape[1]
    check_divides(num_neurons, num_experts)
    if not 0 <= num_shared < num_experts:
        raise ValueError(
            f"num_shared={num_shared} is not between 0 and {num_experts - 1} of {num_experts} experts"
        )
    width = num_neurons // num_experts
    fires_FT = _fires(activations_TF, width if num_active is None else num_active)
    by_rate_F = fires_FT.sum(1).sort(descending=True, stable=True).indices
    shared, routed = by_rate_F[: num_shared * width], by_rate_F[num_shared * width :].sort().values
    groups = routed[_cluster(fires_FT[routed], num_experts - num_shared, seed)]
    return torch.cat([shared.view(num_shared, width).sort(dim=1).values, groups])


def representative_neurons(
    activations_TF: Float[Tensor, "T F"], partition_EI: Int[Tensor, "E I"], *, num_active: int | None = None
) -> Int[Tensor, "E"]:
    """Find the neuron of each expert that fires most like the whole of it.

    CMoE's router scores an expert by the absolute activation of this neuron, ``|act(g x) (u x)|``.

    Args:
        activations_TF: What the partition was made of.
        partition_EI: The routed experts of a partition (of `shared_partition` all but the first S).
        num_active: As for `coactivation_partition`; by default the width of one expert.

    Returns:
        For each expert a neuron, counted in the dense FFN: that of the largest cosine between the tokens it
        fires for and the mean of its expert; of equal ones the first.

    Raises:
        ValueError: `num_active` or the activations are refused, as by `coactivation_partition`.

    Reference: CMoE, section 3, arXiv:2502.04416.

    *Departs from the paper*, which takes the least L2 distance: between rows of few ones and many zeros that
    is small for whichever neuron hardly fires at all, and such a one tells nothing of its expert. Routing a
    small Llama by the least distance was no better than routing it by any neuron of the expert.
    """
    fires_FT = _fires(activations_TF, partition_EI.shape[1] if num_active is None else num_active)
    rows_EIT = fires_FT[partition_EI.cpu()]
    unit_EIT = torch.nn.functional.normalize(rows_EIT, dim=2)
    nearest_E1 = (unit_EIT @ rows_EIT.mean(1).unsqueeze(2)).argmax(1)
    return partition_EI.gather(1, nearest_E1.to(partition_EI.device)).squeeze(1)


def _fires(activations_TF: Tensor, num_active: int) -> Tensor:
    """``[F, T]``: 1 where the neuron is among the token's `num_active` strongest and not zero, else 0."""
    num_tokens, num_neurons = activations_TF.shape
    if num_tokens == 0:
        raise ValueError("the activations are of no token; record some before neurons are grouped by them")
    if not 1 <= num_active <= num_neurons:
        raise ValueError(f"num_active={num_active} is not between 1 and {num_neurons} neurons")
    strength_TF = activations_TF.detach().float().cpu().abs()
    _check_finite(strength_TF, "activations")
    strongest_TK, ids_TK = strength_TF.topk(num_active, dim=1)
    return torch.zeros_like(strength_TF).scatter_(1, ids_TK, (strongest_TK > 0).float()).T.contiguous()


def _check_finite(values: Tensor, what: str) -> None:
    if not values.isfinite().all():
        raise ValueError(f"cannot group neurons: the {what} hold NaN or infinity; check the checkpoint")


def _cluster(rows_FX: Tensor, num_clusters: int, seed: int) -> Tensor:
    """Balanced k-means: ``[E, I]`` row numbers, ascending within a cluster, clusters by their first."""
    centroids_EX = _first_centroids(rows_FX, num_clusters, torch.Generator().manual_seed(seed))
    size = len(rows_FX) // num_clusters
    labels_F, prices_E = np.arange(len(rows_FX)) // size, np.zeros(num_clusters)
    for _ in range(MAX_ROUNDS):
        # Of the squared distance only this differs from choice to choice: all clusters are equally large.
        costs_FE = -(rows_FX @ centroids_EX.T).double().numpy()
        labels_F, prices_E = assign_equally(costs_FE, labels_F, prices_E)
        means_EX = torch.zeros_like(centroids_EX).index_add_(0, torch.from_numpy(labels_F), rows_FX) / size
        if torch.equal(means_EX, centroids_EX):
            break
        centroids_EX = means_EX
    clusters_EI = torch.from_numpy(labels_F.argsort(kind="stable")).view(num_clusters, size)
    return clusters_EI[clusters_EI[:, 0].argsort()]


def _first_centroids(rows_FX: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Draw rows far apart, by their squared distance from the nearest one drawn before (k-means++)."""
    squares_F = rows_FX.square().sum(1)
    nearest_F = torch.full_like(squares_F, torch.inf)
    chosen = [int(torch.randint(len(rows_FX), (), generator=generator))]
    for _ in range(num_clusters - 1):
        distances_F = squares_F + squares_F[chosen[-1]] - 2 * (rows_FX @ rows_FX[chosen[-1]])
        # Never all zero, also where there are fewer different rows than clusters.
        nearest_F = torch.minimum(nearest_F, distances_F).clamp(min=1e-12)
        chosen.append(int(torch.multinomial(nearest_F, 1, generator=generator)))
    return rows_FX[chosen]


def assign_equally(
    costs_FE: Float[np.ndarray, "F E"], labels_F: Int[np.ndarray, "F"], prices_E: Float[np.ndarray, "E"]
) -> tuple[Int[np.ndarray, "F"], Float[np.ndarray, "E"]]:
    """Assign F rows to E clusters of F / E rows each, at the least sum of costs; exact.

    Successive shortest paths: every row takes the cluster that is cheapest with its price added; then, while
    a cluster is too full, rows move on along the cheapest chain of clusters that leads to one with room.

    Args:
        costs_FE: Of each row in each cluster.
        labels_F: Clusters that rows take where no other is cheaper.
        prices_E: Of the clusters. Any are right; those of a similar problem make it fast.

    Returns:
        The cluster of each row, and prices at which none is cheaper for any row.
    """
    rows_F, num_clusters = np.arange(len(costs_FE)), len(prices_E)
    priced_FE = costs_FE + prices_E
    stays_F = priced_FE[rows_F, labels_F] <= priced_FE.min(1)
    labels_F = np.where(stays_F, labels_F, priced_FE.argmin(1))
    excess_E = np.bincount(labels_F, minlength=num_clusters) - len(rows_F) // num_clusters
    moves_EE = np.stack([_cheapest_moves(costs_FE, labels_F, cluster) for cluster in range(num_clusters)])
    tolerance = 1e-12 * np.abs(costs_FE).max()
    while (excess_E > 0).any():
        starts_E = np.where(excess_E > 0, 0.0, np.inf)
        lengths_E, before_E = _shortest_chains(moves_EE, starts_E, tolerance)
        chain = [int(np.where(excess_E < 0, lengths_E, np.inf).argmin())]
        while before_E[chain[0]] >= 0:
            chain.insert(0, int(before_E[chain[0]]))
        _move_along(chain, costs_FE, labels_F, moves_EE, excess_E)
    lengths_E, _ = _shortest_chains(moves_EE, np.zeros(num_clusters), tolerance)
    return labels_F, -lengths_E


def _cheapest_moves(costs_FE: np.ndarray, labels_F: np.ndarray, cluster: int) -> np.ndarray:
    """``[E]``: what it costs to move one row, the best for it, from a cluster to each of them."""
    members = costs_FE[labels_F == cluster]
    return (members - members[:, cluster, None]).min(0, initial=np.inf)


def _shortest_chains(
    moves_EE: np.ndarray, starts_E: np.ndarray, tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Bellman-Ford: cost of the cheapest chain of moves to each cluster, and the cluster before it or -1."""
    lengths_E, before_E = starts_E, np.full(len(starts_E), -1)
    for _ in starts_E:
        through_EE = lengths_E[:, None] + moves_EE
        found_E, from_E = through_EE.min(0), through_EE.argmin(0)
        shorter_E = found_E < lengths_E - tolerance
        if not shorter_E.any():
            break
        lengths_E, before_E = np.where(shorter_E, found_E, lengths_E), np.where(shorter_E, from_E, before_E)
    return lengths_E, before_E


def _move_along(
    chain: list[int],
    costs_FE: np.ndarray,
    labels_F: np.ndarray,
    moves_EE: np.ndarray,
    excess_E: np.ndarray,
) -> None:
    """Move rows from each cluster of the chain to the next, in place: as many as tie and are in excess."""
    movers = []
    for here, there in pairwise(chain):
        members = np.flatnonzero(labels_F == here)
        costs = costs_FE[members, there] - costs_FE[members, here]
        movers.append(members[costs == moves_EE[here, there]])
    count = min(int(excess_E[chain[0]]), -int(excess_E[chain[-1]]), *map(len, movers))
    for rows, there in zip(movers, chain[1:], strict=True):
        labels_F[rows[:count]] = there
    excess_E[chain[0]] -= count
    excess_E[chain[-1]] += count
    for cluster in chain:
        moves_EE[cluster] = _cheapest_moves(costs_FE, labels_F, cluster)
