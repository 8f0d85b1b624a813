"""The load-balancing loss of learned routers, which SMoE-Dropout does without."""

# T tokens, E experts, K active experts

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def load_balance_loss(
    router_logits_TE: Float[Tensor, "T E"],
    expert_ids_TK: Int[Tensor, "T K"],
    counted_T: Bool[Tensor, " T"] | None = None,
) -> Float[Tensor, ""]:
    """``E sum_e f_e P_e``: f the shares of the choices, P the mean probabilities; 1 when both are uniform.

    The gradient flows through P alone. At most E, when one expert has it all.

    Args:
        router_logits_TE: Before the softmax.
        expert_ids_TK: The chosen experts.
        counted_T: Which tokens count, such as those that are no padding; all by default.

    Returns:
        A scalar, of at least single precision; 0 when no token counts.

    Reference: Fedus et al., Switch Transformers, arXiv:2101.03961, eq. 4 to 6, without the factor alpha.

    *Departs from the paper*: for K > 1, f counts every choice and is divided by K, so that it sums to 1 for
    any K.
    """
    num_tokens, num_experts = router_logits_TE.shape
    wide = torch.promote_types(router_logits_TE.dtype, torch.float32)
    weight_T = torch.ones(num_tokens, dtype=wide, device=router_logits_TE.device)
    if counted_T is not None:
        weight_T = counted_T.to(weight_T)
    total = weight_T.sum().clamp_min(1)
    choices_TK = weight_T[:, None].expand(expert_ids_TK.shape)
    counts_E = weight_T.new_zeros(num_experts).scatter_add_(0, expert_ids_TK.flatten(), choices_TK.flatten())
    shares_E = counts_E / (total * expert_ids_TK.shape[1])
    probabilities_E = weight_T @ router_logits_TE.softmax(-1, dtype=wide) / total
    return num_experts * (shares_E @ probabilities_E)
