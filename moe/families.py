"""The few families whose MoE layer does not call ``experts(hidden, expert_ids, weights)`` as others do."""

# T tokens, K active experts, E logical experts, M physical experts

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .layer import ExpertLayer, Routing
from .redirect import redirect_dispatch, redirect_scores


class SwitchLayer(ExpertLayer):
    """Switch Transformers: top-1 as a one-hot mask ``[T, 1, E]``, all zeros for a token over capacity."""

    def as_choices(self, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """One-hot mask to ids; a token over capacity gets id 0 with weight 0."""
        served_T1 = ids.sum(-1).to(weights.dtype)
        return ids.argmax(-1), weights * served_T1

    def physical_choices(self, ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Turn logical choices into the one-hot mask that the experts' forward takes."""
        physical, weights = super().physical_choices(ids_TK, weights_TK)
        return nn.functional.one_hot(physical, self.num_physical_experts), weights

    def run_experts(self, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Run the experts on choices; a weight of 0 is a token over capacity."""
        mask = nn.functional.one_hot(ids_TK, self.num_experts) * (weights_TK != 0).unsqueeze(-1)
        return self.experts_module(hidden_TD, mask, weights_TK)


class Llama4Layer(ExpertLayer):
    """Llama-4: all experts see all tokens, their *input* scaled by the sigmoid score (0 if not chosen)."""

    redirect_hook = staticmethod(redirect_scores)

    @property
    def redirected_module(self) -> Any:
        """Llama-4's block reads the number of experts from the router's scores."""
        return self.router

    def check_replacement(self, num_physical: int, expert_map: Sequence[int]) -> None:
        """Refuse merging under top-k > 1 too, where two scaled inputs of one expert do not add."""
        super().check_replacement(num_physical, expert_map)
        if self.top_k > 1 and num_physical < self.num_experts:
            raise ValueError(
                f"layer {self.name!r} scales the input of an expert (Llama-4) and has top_k={self.top_k}: "
                "two choices in one group cannot be folded exactly; use the stock form"
            )

    def set_expert_map(self, expert_map: Sequence[int]) -> None:
        """Send logical to physical experts by summing their scores."""
        super().set_expert_map(expert_map)
        self.router.num_physical_experts = self.num_physical_experts

    @contextmanager
    def observe(self, on_routed: Callable[[Tensor, Tensor, Tensor], None]) -> Iterator[None]:
        """Call ``on_routed(hidden_TD, expert_ids_TK, routing_weights_TK)`` when the router has run."""

        def after(module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
            weights_TK, ids_TK = output[0].topk(self.top_k, dim=-1)
            on_routed(args[0], ids_TK, weights_TK)

        handle = self.router.register_forward_hook(after, prepend=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def observe_outputs(self, on_outputs: Callable[[Tensor, Tensor, Tensor], None]) -> Iterator[None]:
        """Call ``on_outputs`` with the chosen experts' outputs, which are those of the scaled input."""
        routed: list[tuple[Tensor, Tensor]] = []

        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            ids_TK, weights_TK = routed.pop()
            outputs_TMD = output.view(self.num_physical_experts, len(ids_TK), -1).transpose(0, 1)
            physical, _ = self.physical_choices(ids_TK, weights_TK)
            token = torch.arange(len(ids_TK), device=ids_TK.device).unsqueeze(1)
            on_outputs(ids_TK, weights_TK, outputs_TMD[token, physical])

        handle = self.experts_module.register_forward_hook(after)
        try:
            with self.observe(lambda _, ids, weights: routed.append((ids, weights))):
                yield
        finally:
            handle.remove()

    def run_experts(self, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Run every expert on its scaled tokens and add."""
        num_tokens = hidden_TD.shape[0]
        physical, _ = self.physical_choices(ids_TK, weights_TK)
        scores_TM = hidden_TD.new_zeros(num_tokens, self.num_physical_experts)
        scores_TM = scores_TM.scatter_add(1, physical, weights_TK)
        scaled = (hidden_TD.unsqueeze(0) * scores_TM.T.unsqueeze(-1)).flatten(0, 1)
        return self.experts_module(scaled).unflatten(0, (-1, num_tokens)).sum(0)


class JetMoeLayer(ExpertLayer):
    """JetMoE: the router sorts the tokens by expert and the block runs two parallel linear layers."""

    redirect_hook = staticmethod(redirect_dispatch)

    @property
    def redirected_module(self) -> Any:
        """The block reads the tokens of each expert from the router's sizes."""
        return self.router

    def set_expert_map(self, expert_map: Sequence[int]) -> None:
        """Send logical to physical experts by sorting the tokens anew."""
        super().set_expert_map(expert_map)
        self.router.num_physical_experts = self.num_physical_experts

    def _choices(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        top_TK, ids_TK = logits_TE.topk(self.top_k, dim=-1)
        return ids_TK, top_TK.softmax(-1)

    def check_removal(self, keep: Sequence[int]) -> None:
        """Refuse fewer experts: the config's one count is that of the attention experts too."""
        super().check_removal(keep)
        if len(keep) < self.num_experts:
            raise ValueError(
                f"layer {self.name!r} (JetMoE) cannot do with fewer router rows: num_local_experts counts "
                "its attention experts too; use the moekit form with router='redirect'"
            )

    @contextmanager
    def observe(self, on_routed: Callable[[Tensor, Tensor, Tensor], None]) -> Iterator[None]:
        """Call ``on_routed(hidden_TD, expert_ids_TK, routing_weights_TK)`` when the router has run."""

        def after(module: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]) -> None:
            on_routed(args[0], *self._choices(output[-1]))

        handle = self.router.register_forward_hook(after, prepend=True)
        try:
            yield
        finally:
            handle.remove()

    def route(self, hidden_TD: Tensor, **block_inputs: Any) -> Routing:
        """Route tokens by the model's own router."""
        logits_TE = self.router(hidden_TD)[-1]
        ids_TK, weights_TK = self._choices(logits_TE)
        return Routing(logits_TE, ids_TK, weights_TK.to(hidden_TD.dtype))

    @contextmanager
    def observe_outputs(self, on_outputs: Callable[[Tensor, Tensor, Tensor], None]) -> Iterator[None]:
        """Call ``on_outputs(expert_ids_TK, routing_weights_TK, outputs_TKD)`` after the second layer."""
        routed: list[tuple[Tensor, Tensor]] = []
        orders: list[Tensor] = []

        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            ids_TK, weights_TK = routed.pop()
            outputs_SD = torch.empty_like(output)
            outputs_SD[orders.pop()] = output
            on_outputs(ids_TK, weights_TK, outputs_SD.view(*ids_TK.shape, -1))

        handles = [
            self.router.register_forward_hook(lambda module, args, output: orders.append(output[0])),
            self.block.output_linear.register_forward_hook(after),
        ]
        try:
            with self.observe(lambda _, ids, weights: routed.append((ids, weights))):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def run_experts(self, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Run the parallel experts on choices, as the block does after its router."""
        physical, _ = self.physical_choices(ids_TK, weights_TK)
        order = physical.flatten().argsort(stable=True)
        sizes = physical.flatten().bincount(minlength=self.num_physical_experts).tolist()
        token = order // ids_TK.shape[1]
        fused = self.block.input_linear(hidden_TD[token], sizes)
        gate, up = fused.chunk(2, dim=-1)
        out = self.block.output_linear(self.block.activation(gate) * up, sizes)
        out = out * weights_TK.flatten()[order].unsqueeze(1)
        return torch.zeros_like(hidden_TD).index_add(0, token, out)
