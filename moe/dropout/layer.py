"""The SMoE-Dropout layer: a router and the experts of one FFN, any number of them active."""

# B batch, S sequence, T tokens, D hidden (model) width, E experts, K active experts

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from .experts import SlicedExperts
from .schedule import check_active


class SMoEDropout(nn.Module):
    """Stands where a dense FFN stood: ``y = sum over the K chosen experts of w_e E_e(x)``, plus a bias.

    Attributes:
        router: `SMoERouter`, or one that returns the same three tensors.
        experts: `SlicedExperts`.
        output_bias: ``[D]``, the dense FFN's own bias of its down projection, or ``None``. It is added once,
            which equals a bias of that value in every expert wherever the weights sum to 1 (or to `scale`,
            which belongs to the projections).
        dropout: What the dense module applied to its own output, or ``None``.

    Args:
        router: As above.
        experts: As above.
        output_bias: As above.
        dropout: As above.

    Reference: Chen et al., Sparse MoE as the New Dropout (ICLR 2023), arXiv:2303.01610.

    *Departs from the paper*: the release gives every expert an output bias of its own; here they share one,
    so that the layer has exactly the dense FFN's parameters. The sum is E times the paper's where experts are
    slices (`scale`), from scratch too, so that the layer begins as large as the dense FFN does; the paper's
    own is ``to_smoe_dropout(..., scale=1.0)``.
    """

    router: Any

    def __init__(
        self,
        router: nn.Module,
        experts: SlicedExperts,
        output_bias: nn.Parameter | None = None,
        dropout: nn.Module | None = None,
    ) -> None:
        super().__init__()
        # A block with all its weights: Transformers must not draw new ones when it initialises a model.
        self._is_hf_initialized = True
        self.router = router
        self.experts = experts
        self.register_parameter("output_bias", output_bias)
        self.dropout = dropout

    @property
    def num_experts(self) -> int:
        """E."""
        return self.router.num_experts

    @property
    def active_experts(self) -> int:
        """K, from 1 to E; may be set at any time.

        Raises:
            ValueError: When it is set to less than `min_active_experts` or more than E.
        """
        return self.router.top_k

    @active_experts.setter
    def active_experts(self, k: int) -> None:
        check_active("active_experts", k, self.num_experts)
        if k < self.min_active_experts:
            raise ValueError(
                f"active_experts={k} is less than the {self.min_active_experts} shared experts, which are "
                "always active"
            )
        self.router.top_k = k

    @property
    def min_active_experts(self) -> int:
        """The smallest K: 1, or the number of experts that the router always chooses."""
        return getattr(self.router, "min_active_experts", 1)

    def forward(self, hidden_states: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Route every token and sum its experts."""
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights_TK, ids_TK = self.router(hidden_TD)
        out_TD = self.experts(hidden_TD, ids_TK, weights_TK)
        if self.output_bias is not None:
            out_TD = out_TD + self.output_bias
        out = out_TD.view(hidden_states.shape)
        return out if self.dropout is None else self.dropout(out)
