"""The router of SMoE-Dropout: random, never trained, the same for all of a model's life."""

# T tokens, D hidden (model) width, E experts, K active experts

from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Combine = Literal["softmax", "uniform", "residual"]
COMBINE_RULES: tuple[str, ...] = get_args(Combine)

LOGIT_STD = 0.32
"""Standard deviation of the logits for hidden states of unit mean square: the release's 0.02 sqrt(256)."""


class SMoERouter(nn.Module):
    """Chooses the K largest of E logits, ``z = R x + c``, and weighs them by one of three rules.

    ``softmax`` (the paper): softmax over the K chosen logits, times `scale`. The same as softmax over all
    logits, top-k, renormalised: Mixtral's rule.
    ``uniform``: every chosen expert weighs ``scale / K``, dropout's inverse scaling; exact at K = E.
    ``residual``: ``scale (1 + p_e u_e)`` with p the softmax over all logits and u learned from 0 (CMoE).

    R ~ N(0, logit_std^2 / D) and c are buffers, so no optimizer, weight decay or adapter can move them, and
    gradients flow through them into the hidden states. With ``trainable=True`` R is a parameter, and c stays
    zero: the learned router that SMoE-Dropout is compared with, and Mixtral's.

    Attributes:
        weight: R, ``[E, D]``.
        bias: c, ``[E]``; zero, or ``-R E[x]`` once `center_routers` has balanced the load.
        gain: u, ``[E]``, for ``residual``; else ``None``.
        top_k: K.
        scale: What the weights sum to in ``softmax`` and ``uniform``: E for experts that are slices of one
            FFN (their sum is that FFN), 1 for experts that are copies of it.

    Args:
        num_experts: E.
        hidden_size: D.
        combine: The rule.
        scale: As above.
        trainable: Whether R is learned.
        like: A tensor whose device and dtype the new, uninitialised tensors take.

    Reference: Chen et al., Sparse MoE as the New Dropout (ICLR 2023), section 3, arXiv:2303.01610.

    *Departs from the paper*: the deviation of R follows the width, where the release draws N(0, 0.02^2) for
    every width; at the release's own width of 256 they are the same.
    """

    weight: Tensor
    bias: Tensor
    gain: Any

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        *,
        combine: Combine = "softmax",
        scale: float = 1.0,
        trainable: bool = False,
        like: Tensor,
    ) -> None:
        super().__init__()
        if combine not in COMBINE_RULES:
            raise ValueError(f"combine={combine!r} is not one of {', '.join(COMBINE_RULES)}")
        self.num_experts = num_experts
        self.top_k = num_experts
        self.combine = combine
        self.scale = scale
        weight = torch.empty(num_experts, hidden_size, dtype=like.dtype, device=like.device)
        bias = torch.zeros_like(weight[:, 0])
        if trainable:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_parameter(
            "gain", nn.Parameter(torch.zeros_like(bias)) if combine == "residual" else None
        )

    @property
    def kind(self) -> str:
        """``random`` or ``learned``, the key of `ROUTERS` that builds it."""
        return "learned" if isinstance(self.weight, nn.Parameter) else "random"

    def extra_repr(self) -> str:
        """Rule and sizes."""
        return f"num_experts={self.num_experts}, top_k={self.top_k}, combine={self.combine!r}"

    @torch.no_grad()
    def draw(self, generator: torch.Generator, logit_std: float = LOGIT_STD) -> None:
        """Draw R; the numbers depend on the generator only, not on device or dtype."""
        drawn = torch.randn(self.weight.shape, generator=generator) * logit_std / self.weight.shape[1] ** 0.5
        self.weight.copy_(drawn)
        self.bias.zero_()

    def forward(
        self, hidden_states: Float[Tensor, "T D"]
    ) -> tuple[Float[Tensor, "T E"], Float[Tensor, "T K"], Int[Tensor, "T K"]]:
        """Return logits, routing weights and expert ids, the form of Transformers' routers."""
        logits_TE = nn.functional.linear(hidden_states, self.weight, self.bias)
        if self.top_k < self.num_experts:
            chosen_TK, ids_TK = logits_TE.topk(self.top_k, dim=-1)
        else:
            chosen_TK = logits_TE
            ids_TK = torch.arange(self.num_experts, device=logits_TE.device).expand(len(logits_TE), -1)
        weights_TK = self._weigh(logits_TE, chosen_TK, ids_TK)
        return logits_TE, weights_TK.to(hidden_states.dtype), ids_TK

    def _weigh(self, logits_TE: Tensor, chosen_TK: Tensor, ids_TK: Tensor) -> Tensor:
        wide = torch.promote_types(chosen_TK.dtype, torch.float32)
        if self.combine == "uniform":
            return torch.full_like(chosen_TK, self.scale / self.top_k)
        if self.combine == "softmax":
            return chosen_TK.softmax(-1, dtype=wide) * self.scale
        probabilities_TE = logits_TE.softmax(-1, dtype=wide)
        return self.scale * (1 + probabilities_TE.gather(1, ids_TK) * self.gain[ids_TK])
