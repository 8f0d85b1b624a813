"""How evenly a policy uses its experts, and how sure its routers are."""

# T tokens, E logical experts, K active experts, L layers

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from jaxtyping import Shaped
from torch import Tensor

from ..moe.layer import ExpertLayer


class ExpertMeter:
    """Adds up what routers decide in the forward passes that it listens to; padding never counts.

    Attributes:
        sums: ``[L, E + 2]`` float64: for each layer the choices of each expert (E of the largest layer,
            zeros where another has fewer), the sum over tokens of the router's entropy in nats, and the
            tokens. Sums of several processes add up.

    Args:
        layers: Of the policy, one at least.
    """

    def __init__(self, layers: Sequence[ExpertLayer]) -> None:
        self.layers = layers
        most = max(layer.num_experts for layer in layers)
        self.sums = torch.zeros(len(layers), most + 2, dtype=torch.float64, device=layers[0].device)

    @contextmanager
    def listen(self, weights: Shaped[Tensor, "B S"]) -> Iterator[None]:
        """Count a forward pass inside the context.

        Args:
            weights: How often a token counts, as an attention mask or `Arrangement.weights`; 0 for padding.
        """
        counted_T = weights.flatten()
        with ExitStack() as stack:
            for number, layer in enumerate(self.layers):
                stack.enter_context(layer.observe_logits(partial(self._add_logits, number, counted_T)))
                stack.enter_context(layer.observe(partial(self._add_choices, number, counted_T)))
            yield

    @torch.no_grad()
    def _add_logits(self, number: int, counted_T: Tensor, logits_TE: Tensor) -> None:
        logprobs_TE = logits_TE.log_softmax(-1, dtype=torch.float32)
        entropy_T = -torch.linalg.vecdot(logprobs_TE.exp(), logprobs_TE)
        weight_T = counted_T.to(entropy_T)
        self.sums[number, -2:] += torch.stack([weight_T @ entropy_T, weight_T.sum()]).to(self.sums)

    @torch.no_grad()
    def _add_choices(
        self, number: int, counted_T: Tensor, hidden_TD: Tensor, ids: Tensor, weights: Tensor
    ) -> None:
        layer = self.layers[number]
        ids_TK, weights_TK = layer.as_choices(ids, weights)
        # A weight of 0 is a choice that was not served; ids from E on are of experts without weights.
        is_real_TK = (weights_TK != 0) & (ids_TK < layer.num_experts)
        bins_TK = torch.where(is_real_TK, ids_TK, 0)
        counted_TK = is_real_TK * counted_T.to(ids_TK.device)[:, None]
        counts_E = self.sums[number, : layer.num_experts]
        counts_E.scatter_add_(0, bins_TK.flatten().to(counts_E.device), counted_TK.flatten().to(counts_E))

    def metrics(self) -> dict[str, float]:
        """Means over the layers, empty before anything was counted.

        Returns:
            ``router_entropy``: nats. ``expert_load_max``: choices of the busiest expert of a layer in units
            of the layer's mean, 1 in perfect balance. ``expert_dead_share``: experts that no token chose, in
            [0, 1].
        """
        found = []
        for layer, sums in zip(self.layers, self.sums.cpu(), strict=True):
            counts_E, (entropy, num_tokens) = sums[: layer.num_experts], sums[-2:]
            if counts_E.sum() > 0:
                load = counts_E.max() / counts_E.mean()
                found.append(
                    torch.stack([entropy / num_tokens.clamp_min(1), load, (counts_E == 0).double().mean()])
                )
        if not found:
            return {}
        means = torch.stack(found).mean(0).tolist()
        return dict(zip(("router_entropy", "expert_load_max", "expert_dead_share"), means, strict=True))
