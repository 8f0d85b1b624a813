"""THOR: experts drawn at random, and a loss that makes them agree."""

# T tokens, D hidden (model) width, E experts, K active experts, V vocabulary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .hash_router import check_equal_weights


class ThorRouter(nn.Module):
    """Draws K experts: in training once per forward for the whole batch, else for every token.

    In training the numbers are those of torch's global generator, so a resumed run goes on with them and
    gradient checkpointing repeats them. In evaluation they follow from `seed` and the token's place in the
    flattened batch: the same inputs in the same batches have the same outputs.

    Attributes:
        seed: Of the choice in evaluation; drawn with the model and saved with it.
        top_k: K; the paper's is 1.

    Args:
        num_experts: E.
        combine: ``softmax`` or ``uniform``, which are the same here, where no expert is preferred.
        scale: What the weights sum to.
        like: A tensor whose device the seed takes.

    Raises:
        ValueError: ``combine="residual"``, which needs probabilities.

    Reference: Zuo et al., Taming Sparsely Activated Transformer with Stochastic Experts, arXiv:2110.04260.

    *Departs from the paper*: any K; evaluation can be repeated, where the official code draws anew each time.
    """

    kind = "thor"
    seed: Tensor

    def __init__(
        self, num_experts: int, *, combine: str = "uniform", scale: float = 1.0, like: Tensor
    ) -> None:
        super().__init__()
        check_equal_weights(self.kind, combine)
        self.num_experts = num_experts
        self.top_k = num_experts
        self.combine = combine
        self.scale = scale
        self.register_buffer("seed", torch.zeros((), dtype=torch.int64, device=like.device))

    def extra_repr(self) -> str:
        """Sizes."""
        return f"num_experts={self.num_experts}, top_k={self.top_k}"

    @torch.no_grad()
    def draw(self, generator: torch.Generator, logit_std: float = 0.0) -> None:
        """Draw the seed; there are no logits to deviate."""
        self.seed.copy_(torch.randint(2**62, (), generator=generator))

    def forward(
        self, hidden_states: Float[Tensor, "T D"]
    ) -> tuple[Float[Tensor, "T E"], Float[Tensor, "T K"], Int[Tensor, "T K"]]:
        """Return random scores in place of logits, routing weights and the ids of the K highest scores."""
        scores_TE = self._scores(hidden_states)
        ids_TK = scores_TE.topk(self.top_k, dim=-1).indices
        return scores_TE, hidden_states.new_full(ids_TK.shape, self.scale / self.top_k), ids_TK

    def _scores(self, hidden_TD: Tensor) -> Tensor:
        shape = len(hidden_TD), self.num_experts
        if self.training:
            return torch.rand(self.num_experts, device=hidden_TD.device).expand(shape)
        generator = torch.Generator().manual_seed(int(self.seed))
        return torch.rand(shape, generator=generator).to(hidden_TD.device)


def consistency_loss(
    logits_1: Float[Tensor, "*batch V"],
    logits_2: Float[Tensor, "*batch V"],
    counted: Bool[Tensor, "*batch"],
    *,
    num_items: Tensor | int | None = None,
) -> Float[Tensor, ""]:
    """Mean over the counted tokens of ``(KL(p1 || p2) + KL(p2 || p1)) / 2``.

    Args:
        logits_1: Of one forward.
        logits_2: Of another.
        counted: Which tokens count.
        num_items: What to divide the sum by, for a batch in several parts; by default the counted tokens.

    Reference: arXiv:2110.04260.
    """
    wide = torch.promote_types(logits_1.dtype, torch.float32)
    # Both divergences in one sum: (p1 - p2) (log p1 - log p2).
    log_1, log_2 = (logits[counted].log_softmax(-1, dtype=wide) for logits in (logits_1, logits_2))
    total = ((log_1.exp() - log_2.exp()) * (log_1 - log_2)).sum()
    return total / (2 * (counted.sum() if num_items is None else num_items))


def thor_loss(
    logits_1: Float[Tensor, "T V"],
    logits_2: Float[Tensor, "T V"],
    labels: Int[Tensor, " T"],
    *,
    alpha: float = 1.0,
    num_items: Tensor | int | None = None,
) -> Float[Tensor, ""]:
    """THOR's objective on two forwards of a batch: both cross-entropies and `alpha` times the consistency.

    Args:
        logits_1: Of one forward, in line with the labels (a causal model's are shifted).
        logits_2: Of the other.
        labels: -100 does not count.
        alpha: Weight of the consistency.
        num_items: As in `consistency_loss`.

    Reference: arXiv:2110.04260.
    """
    counted = labels != -100
    num_items = counted.sum() if num_items is None else num_items
    entropies = [
        nn.functional.cross_entropy(logits, labels, reduction="sum") for logits in (logits_1, logits_2)
    ]
    divergence = consistency_loss(logits_1, logits_2, counted, num_items=num_items)
    return sum(entropies) / num_items + alpha * divergence
