"""CMoE's router: a frozen one that need not be random, because one neuron speaks for each expert."""

# T tokens, D hidden (model) width, E experts, K active experts

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..weights import ExpertWeights


class AnalyticRouter(nn.Module):
    """Chooses the experts whose representative neuron fires most: ``s_e = |act(g_e x) (u_e x)|``.

    Shared experts come first at every K. Chosen routed experts weigh ``1 + p_e u_e``, with p the softmax
    over the routed scores and u learned from 0 (`gain`), shared ones 1: until u is trained, K = E is the
    dense FFN.
    Everything but u is a buffer, copied from the FFN when `to_cmoe` makes the layer.

    Attributes:
        gate: ``[E, D]`` rows of the representative neurons; ``None`` for an FFN without a gate.
        up: ``[E, D]``.
        gate_bias: ``[E]`` or ``None``.
        up_bias: ``[E]`` or ``None``.
        is_shared: ``[E]``; the rows of shared experts are not used.
        top_k: K, shared experts included.

    Args:
        num_experts: E.
        weights: The FFN; tells which tensors there are, their dtype and device.
        activation: The FFN's own.

    Reference: Pei et al., CMoE (2025), section 4, arXiv:2502.04416.

    *Departs from the paper*: no bias for balancing the load is learned; K counts shared experts.
    """

    kind = "analytic"
    combine = "residual"
    scale = 1.0

    gate: Tensor | None
    up: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    is_shared: Tensor

    def __init__(self, num_experts: int, weights: ExpertWeights, activation: nn.Module) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.top_k = num_experts
        self.act_fn = activation
        for name in ("gate", "up", "gate_bias", "up_bias"):
            tensor = getattr(weights, name)
            rows = (
                None
                if tensor is None
                else torch.zeros_like(tensor[:1]).repeat(num_experts, *[1] * (tensor.ndim - 1))
            )
            self.register_buffer(name, rows)
        self.register_buffer(
            "is_shared", torch.zeros(num_experts, dtype=torch.bool, device=weights.up.device)
        )
        self.gain = nn.Parameter(torch.zeros_like(weights.up[:1, 0]).repeat(num_experts))

    @property
    def min_active_experts(self) -> int:
        """The smallest K: the shared experts."""
        return 1 if self.is_shared.is_meta else max(1, int(self.is_shared.sum()))

    def extra_repr(self) -> str:
        """Sizes."""
        return f"num_experts={self.num_experts}, top_k={self.top_k}"

    @torch.no_grad()
    def draw(self, generator: torch.Generator, logit_std: float) -> None:
        """Draw nothing: only `represent` says anything."""

    @torch.no_grad()
    def represent(self, weights: ExpertWeights, neurons: Int[Tensor, " R"]) -> None:
        """Take the rows of one neuron for each of the R routed experts, which are the last R of the E."""
        num_shared = self.num_experts - len(neurons)
        self.is_shared[:] = torch.arange(self.num_experts, device=self.is_shared.device) < num_shared
        for name in ("gate", "up", "gate_bias", "up_bias"):
            if (rows := getattr(self, name)) is not None:
                rows[num_shared:] = getattr(weights, name)[neurons.to(rows.device)]

    def scores(self, hidden_states: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        """How strongly each expert's representative fires; 0 for shared experts."""
        up_TE = nn.functional.linear(hidden_states, self.up, self.up_bias)
        if self.gate is None:
            return self.act_fn(up_TE).abs()
        return (self.act_fn(nn.functional.linear(hidden_states, self.gate, self.gate_bias)) * up_TE).abs()

    def forward(
        self, hidden_states: Float[Tensor, "T D"]
    ) -> tuple[Float[Tensor, "T E"], Float[Tensor, "T K"], Int[Tensor, "T K"]]:
        """Return scores (shared experts' above all others), routing weights and expert ids."""
        scores_TE = self.scores(hidden_states)
        shared_E: Bool[Tensor, " E"] = self.is_shared
        logits_TE = torch.where(shared_E, scores_TE.detach().amax(-1, keepdim=True) + 1, scores_TE)
        ids_TK = logits_TE.topk(self.top_k, dim=-1).indices
        wide = torch.promote_types(scores_TE.dtype, torch.float32)
        probabilities_TE = scores_TE.masked_fill(shared_E, -torch.inf).softmax(-1, dtype=wide)
        weights_TK = 1 + probabilities_TE.gather(1, ids_TK) * self.gain[ids_TK]
        return logits_TE, weights_TK.to(hidden_states.dtype), ids_TK
