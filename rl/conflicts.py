"""Tokens that good and bad completions of a prompt share at their beginning or their end (GTPO)."""

# B completions, L positions, G completions of one group

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def conflict_runs(
    ids_BL: Int[Tensor, "B L"],
    mask_BL: Bool[Tensor, "B L"],
    advantages_B: Float[Tensor, " B"],
    group_ids_B: Int[Tensor, " B"],
) -> tuple[Bool[Tensor, "B L"], Bool[Tensor, "B L"]]:
    """Runs of conflicting tokens from the beginning and from the end.

    A token conflicts where its id stands at the same position (counted from that end) in a completion with a
    positive and in one with a negative advantage; partners may differ from token to token. Runs end at the
    first token without conflict. Completions without advantage take no part.

    Args:
        ids_BL: Right-padded.
        mask_BL: False for padding.
        advantages_B: Of which the sign counts.
        group_ids_B: Same number, same prompt.

    Returns:
        The run from the beginning, and the one from the end.

    Reference: GTPO, arXiv:2508.03772, and the code that its authors released.
    """
    from_end_BL = mask_BL.sum(1, keepdim=True) - 1 - torch.arange(ids_BL.shape[1], device=ids_BL.device)
    mirror_BL = from_end_BL.clamp_min(0)
    mirrored_ids_BL, is_inside_BL = ids_BL.gather(1, mirror_BL), from_end_BL >= 0
    prefix_BL, mirrored_BL = torch.zeros_like(mask_BL), torch.zeros_like(mask_BL)
    for group in group_ids_B.unique():
        rows = group_ids_B == group
        prefix_BL[rows] = _initial_run(ids_BL[rows], mask_BL[rows], advantages_B[rows])
        mirrored_BL[rows] = _initial_run(mirrored_ids_BL[rows], is_inside_BL[rows], advantages_B[rows])
    return prefix_BL, mirrored_BL.gather(1, mirror_BL) & is_inside_BL


def _initial_run(ids_GL: Tensor, mask_GL: Tensor, advantages_G: Tensor) -> Tensor:
    is_same_GGL = (ids_GL[:, None] == ids_GL) & mask_GL[:, None] & mask_GL
    is_in_good_GL = (is_same_GGL & (advantages_G > 0)[:, None]).any(1)
    is_in_bad_GL = (is_same_GGL & (advantages_G < 0)[:, None]).any(1)
    conflicts_GL = is_in_good_GL & is_in_bad_GL & (advantages_G != 0)[:, None]
    return conflicts_GL.cumprod(1).bool()
