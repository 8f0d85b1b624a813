"""One matrix as ``U V + S``, by a singular value decomposition and the rows that it fits worst."""

# O outputs, I inputs, R rank, N rows of S

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

RIDGE = 1e-2
"""Share of the mean second moment that is added to every direction, for what few tokens do not show."""


class Factors(NamedTuple):
    """``W = u v``, with ``rows`` added to the rows ``row_index``."""

    u: Tensor
    """``[O, R]``."""
    v: Tensor
    """``[R, I]``."""
    rows: Tensor
    """``[N, I]``."""
    row_index: Tensor
    """``[N]`` long, ascending."""

    def dense(self) -> Tensor:
        """The matrix, ``[O, I]``."""
        return (self.u @ self.v).index_add(0, self.row_index, self.rows)


@torch.no_grad()
def decompose(
    weight_OI: Float[Tensor, "O I"],
    rank: int,
    num_rows: int = 0,
    moment_II: Float[Tensor, "I I"] | None = None,
) -> Factors:
    """Best product of a rank, and the rows in which it is worst made whole.

    Minimises ``||(W - U V) C^(1/2)||``, where C is the second moment of what the matrix reads: the squared
    error of its outputs. Singular values are shared between both factors by their square roots.

    Args:
        weight_OI: W.
        rank: R.
        num_rows: N, rows of ``W - U V`` of largest weighted norm that S holds.
        moment_II: C; the identity by default, a plain decomposition.

    Returns:
        Factors in the dtype of W.

    Raises:
        ValueError: A rank or a number of rows out of range, or NaN or infinity.

    Reference: MC-SMoE, arXiv:2310.01334, section 3.2; the start of LoSparse, arXiv:2306.11222.

    *Departs from the paper*: weighted by what is read, and S is sparse from the start, for use without
    training.
    """
    num_out, num_in = weight_OI.shape
    if not 1 <= rank <= min(num_out, num_in) or not 0 <= num_rows <= num_out:
        raise ValueError(
            f"rank {rank} and {num_rows} rows do not fit a matrix of {num_out} x {num_in}: at most "
            f"{min(num_out, num_in)} and {num_out}"
        )
    if not weight_OI.isfinite().all() or (moment_II is not None and not moment_II.isfinite().all()):
        raise ValueError("cannot factorise: the weights or the samples hold NaN or infinity")
    wide_OI = weight_OI.double()
    root_II, inverse_II = _roots(moment_II, num_in, wide_OI)
    left_OK, values_K, right_KI = torch.linalg.svd(wide_OI @ root_II, full_matrices=False)
    scale_R = values_K[:rank].sqrt()
    u_OR, v_RI = left_OK[:, :rank] * scale_R, scale_R[:, None] * right_KI[:rank] @ inverse_II
    residual_OI = wide_OI - u_OR @ v_RI
    worst_N = (residual_OI @ root_II).norm(dim=1).argsort(descending=True, stable=True)[:num_rows]
    index_N: Int[Tensor, " N"] = worst_N.sort().values
    dtype = weight_OI.dtype
    return Factors(u_OR.to(dtype), v_RI.to(dtype), residual_OI[index_N].to(dtype), index_N)


def _roots(moment_II: Tensor | None, num_in: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """``C^(1/2)`` and its inverse."""
    if moment_II is None:
        identity_II = torch.eye(num_in, dtype=like.dtype, device=like.device)
        return identity_II, identity_II
    values_I, vectors_II = torch.linalg.eigh(moment_II.to(like))
    values_I = values_I.clamp(min=0)
    root_I = (values_I + RIDGE * values_I.mean().clamp(min=1e-30)).sqrt()
    return (vectors_II * root_I) @ vectors_II.T, (vectors_II / root_I) @ vectors_II.T


@torch.no_grad()
def second_moment(inputs_TI: Float[Tensor, "T I"]) -> Float[Tensor, "I I"]:
    """``mean x x^T``, float64."""
    wide_TI = inputs_TI.double()
    return wide_TI.T @ wide_TI / max(1, len(wide_TI))
