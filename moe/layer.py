"""One view of a Mixture-of-Experts layer, whatever the family: read it, route with it, rebuild it."""

# T tokens, D hidden (model) width, E logical experts, M physical experts, K active experts

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .group_router import group_logits, set_group_router
from .redirect import clear_expert_map, redirect, set_expert_map, skip_absent_choices
from .router import (
    RouterConstraints,
    read_constraints,
    reduce_router,
    router_shows_probabilities,
    router_tensors,
    router_top_k,
)
from .storage import ExpertStorage, write_experts
from .weights import ExpertWeights


@dataclass(frozen=True, slots=True)
class Routing:
    """What a router decided for T tokens."""

    router_logits: Tensor | None
    """``[T, E]`` before softmax or sigmoid; ``None`` where the family shows none."""
    expert_ids: Tensor
    """``[T, K]`` logical experts; E and above are experts without weights (LongCat)."""
    routing_weights: Tensor
    """``[T, K]``."""


class _RoutedError(Exception):
    """Leaves a block's forward once its routing is known."""


class ExpertLayer:
    """An MoE layer of a Transformers model.

    Most families differ only in how they store their experts (`ExpertStorage`): their block calls
    ``experts(hidden_states, expert_ids, routing_weights)``, and everything here hangs on that call. The
    exceptions are small subclasses in `families.py`.

    Attributes:
        name: Module path of the block that holds experts and router, such as ``model.layers.3.mlp``.
        block: That module.
        experts_module: The container of the experts.
        router: The family's own router.
        logits_index: Where in the router's output the logits are; ``None`` when it returns them alone.
    """

    redirect_hook: Callable[..., Any] = staticmethod(redirect)

    def __init__(
        self,
        *,
        name: str,
        block: nn.Module,
        experts_module: nn.Module,
        router: nn.Module,
        storage: ExpertStorage,
        config: Any,
        logits_index: int | None = 0,
    ) -> None:
        self.name = name
        # Any: nn.Module's __getattr__ hides what a family's own class has.
        self.block: Any = block
        self.experts_module: Any = experts_module
        self.router: Any = router
        self.storage = storage
        self.config = config
        self.logits_index = logits_index

    def __repr__(self) -> str:
        """Name and sizes."""
        kept = "" if self.expert_map is None else f" on {self.num_physical_experts}"
        return f"{type(self).__name__}({self.name!r}, {self.num_experts} experts{kept}, top-{self.top_k})"

    @property
    def redirected_module(self) -> Any:
        """The module that carries the buffer `expert_map` and its hook."""
        return self.experts_module

    @property
    def expert_map(self) -> Tensor | None:
        """``[E]`` long, logical to physical expert; ``None`` when they are the same."""
        full = self.redirected_module._buffers.get("expert_map")
        if full is None:
            return None
        return full[: len(full) - self._num_weightless]

    @property
    def _num_weightless(self) -> int:
        return getattr(self.experts_module, "zero_expert_num", 0)

    @property
    def num_physical_experts(self) -> int:
        """M, the experts whose weights are there."""
        return len(self.storage)

    @property
    def num_experts(self) -> int:
        """E, the experts that the router tells apart."""
        return self.num_physical_experts if self.expert_map is None else len(self.expert_map)

    @cached_property
    def top_k(self) -> int:
        """K, the experts chosen for each token."""
        return router_top_k(self.router, self.block, self.config)

    @property
    def hidden_size(self) -> int:
        """D, the width of an expert's input and output."""
        return self.storage.read(0).hidden_size

    @cached_property
    def router_constraints(self) -> RouterConstraints:
        """What the router's rule demands of whoever removes experts."""
        return read_constraints(self)

    @property
    def input_size(self) -> int:
        """Width of what the block takes; differs from D where experts work in a latent space (Nemotron-H)."""
        matrices = (tensor for tensor in router_tensors(self.router) if tensor.ndim == 2)
        matrix = next(matrices, None)  # a hash router has none
        return self.hidden_size if matrix is None else matrix.shape[-1]

    def experts(self) -> list[ExpertWeights]:
        """Views of the M experts."""
        return [self.storage.read(index) for index in range(self.num_physical_experts)]

    @contextmanager
    def observe(self, on_routed: Callable[[Tensor, Tensor, Tensor], None]) -> Iterator[None]:
        """Call ``on_routed(hidden_TD, expert_ids_TK, routing_weights_TK)`` before the experts run.

        Ids are logical, whether the layer is merged or not.
        """

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            on_routed(*args, *kwargs.values())

        handle = self.experts_module.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def observe_logits(self, on_logits: Callable[[Tensor], None]) -> Iterator[None]:
        """Call ``on_logits(router_logits_TE)`` after the router has run."""

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            logits = output if isinstance(output, Tensor) else output[self.logits_index or 0]
            on_logits(self.as_logits(logits.flatten(0, -2)))

        handle = self.router.register_forward_hook(after, prepend=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def observe_outputs(self, on_outputs: Callable[[Tensor, Tensor, Tensor], None]) -> Iterator[None]:
        """Call ``on_outputs(expert_ids_TK, routing_weights_TK, outputs_TKD)`` when the experts have run.

        The outputs are those of single experts before weighting. The experts' own forward runs once, with
        every choice as a token of its own.

        Raises:
            ValueError: The layer is being observed already.
        """
        routed: list[tuple[Tensor, Tensor]] = []
        inner = self.experts_module.forward
        # Accelerate sets a forward of its own on a module that it moves between devices.
        own_forward = vars(self.experts_module).get("forward")
        if getattr(own_forward, "observes_outputs", False):
            raise ValueError(f"layer {self.name!r} is being recorded already; leave that context first")

        def forward(hidden_TD: Tensor, *_: Tensor) -> Tensor:
            ids_TK, weights_TK = self.as_choices(*routed.pop())
            num_choices = ids_TK.shape[1]
            flat_TD = hidden_TD.reshape(-1, hidden_TD.shape[-1])
            rows_SD = flat_TD.repeat_interleave(num_choices, 0) if num_choices > 1 else flat_TD
            choices = ids_TK.reshape(-1, 1), torch.ones_like(weights_TK).view(-1, 1)
            outputs_SD = inner(rows_SD, *self.physical_choices(*choices))
            outputs_TKD = outputs_SD.view(*ids_TK.shape, -1)
            on_outputs(ids_TK, weights_TK, outputs_TKD)
            summed_TD = outputs_TKD[:, 0] * weights_TK[:, :1]
            for choice in range(1, num_choices):  # product and sum at once would need another [T, K, D]
                summed_TD = summed_TD.addcmul(outputs_TKD[:, choice], weights_TK[:, choice, None])
            return summed_TD.to(hidden_TD.dtype).view(hidden_TD.shape)

        forward.observes_outputs = True  # pyright: ignore[reportFunctionMemberAccess]
        with self.observe(lambda _, ids, weights: routed.append((ids, weights))):
            self.experts_module.forward = forward
            try:
                yield
            finally:
                if own_forward is None:
                    del self.experts_module.forward
                else:
                    self.experts_module.forward = own_forward

    def physical_choices(self, ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Turn logical choices into what the experts' forward takes, past the hook that maps them."""
        full_map = self.redirected_module._buffers.get("expert_map")
        ids_TK = ids_TK if full_map is None else full_map[ids_TK]
        if self._num_weightless:
            # LongCat's experts fail on a single choice, so an absent second one is added.
            return ids_TK.repeat(1, 2), torch.cat([weights_TK, torch.zeros_like(weights_TK)], 1)
        return ids_TK, weights_TK

    def as_logits(self, router_output_TE: Tensor) -> Float[Tensor, "T E"]:
        """Bring what the router shows to one logit for each of this layer's experts."""
        if self.shows_probabilities:
            router_output_TE = router_output_TE.clamp_min(torch.finfo(router_output_TE.dtype).tiny).log()
        if self.router_mode == "logsumexp":
            return group_logits(router_output_TE.float(), self.router.expert_group, self.num_experts)
        return router_output_TE[:, : self.num_experts]

    @cached_property
    def shows_probabilities(self) -> bool:
        """Whether the router's first output is its softmax already (Gemma-4)."""
        return router_shows_probabilities(self)

    @property
    def router_mode(self) -> str:
        """``full``: E rows, E experts; ``redirect``: E rows, M experts; ``logsumexp``: M groups of rows."""
        if "expert_group" in self.router._buffers:
            return "logsumexp"
        return "full" if self.expert_map is None else "redirect"

    @property
    def block_is_decoder_layer(self) -> bool:
        """Whether router and experts sit on the decoder layer itself and read different inputs (Gemma-4)."""
        return any("attn" in name or "attention" in name for name, _ in self.block.named_children())

    def route(self, hidden_TD: Float[Tensor, "T D"], **block_inputs: Any) -> Routing:
        """Route tokens by the model's own router.

        Args:
            hidden_TD: The input of the block (of the router, where it sits on the decoder layer: Gemma-4).
            **block_inputs: What else the block's forward needs, such as ``input_ids`` for hash routing.
        """
        logits: list[Tensor] = []
        routed: list[tuple[Tensor, Tensor]] = []

        def stop(hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
            routed.append((ids, weights))
            raise _RoutedError

        with self.observe(stop), self.observe_logits(logits.append):
            if self.block_is_decoder_layer:
                _, weights, ids = self.router(hidden_TD)
                routed.append((ids, weights))
            else:
                with suppress(_RoutedError):
                    self.block(hidden_TD.unsqueeze(0), **block_inputs)
        ids, weights = routed[0]
        return Routing(logits[0] if logits else None, *self.as_choices(ids, weights))

    def as_choices(self, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Bring what the experts are called with to ids ``[T, K]`` and weights ``[T, K]``."""
        return ids, weights

    def run_experts(
        self, hidden_TD: Float[Tensor, "T D"], ids_TK: Int[Tensor, "T K"], weights_TK: Float[Tensor, "T K"]
    ) -> Float[Tensor, "T D"]:
        """Run the experts on logical choices by the model's own implementation."""
        return self.experts_module(hidden_TD, ids_TK, weights_TK).view(hidden_TD.shape)

    def check_replacement(self, num_physical: int, expert_map: Sequence[int]) -> None:
        """Refuse a map that does not fit.

        Raises:
            ValueError: A wrong length, or a physical expert that does not exist or is never used.
        """
        if len(expert_map) != self.num_experts:
            raise ValueError(
                f"expert_map has {len(expert_map)} entries for the {self.num_experts} experts of "
                f"layer {self.name!r}"
            )
        if sorted(set(expert_map)) != list(range(num_physical)):
            raise ValueError(
                f"expert_map of layer {self.name!r} points to the experts {sorted(set(expert_map))}; it must "
                f"use each of 0..{num_physical - 1}"
            )

    def replace_experts(
        self, experts: Sequence[ExpertWeights], expert_map: Sequence[int], *, router: str = "redirect"
    ) -> None:
        """Put M new experts behind the router of E logical ones.

        A merged layer can be merged again: its logical experts get a new map, which replaces the old one. The
        logical experts of a layer that routes among groups are those groups; merging them joins the groups.

        Args:
            experts: The M experts; they may be views of the present ones.
            expert_map: For each of the E logical experts, the index in `experts` that serves it.
            router: ``redirect`` chooses among E experts and sends each choice on; ``logsumexp`` chooses among
                the M groups by their exact softmax probability.

        Raises:
            ValueError: The map does not fit, the experts have other shapes, the router's rule has no group
                probability, or `router` is neither. Nothing is changed then.
        """
        self.check_replacement(len(experts), expert_map)
        self._check_router_mode(router, list(expert_map), len(experts))
        write_experts(self.storage, list(experts))
        if router == "logsumexp":
            self.set_expert_groups(expert_map, **self.router_constraints.group_rule)
        else:
            self.set_expert_map(expert_map)

    def _check_router_mode(self, router: str, expert_map: list[int], num_groups: int) -> None:
        if router not in ("redirect", "logsumexp"):
            raise ValueError(f"router={router!r} is not 'redirect' or 'logsumexp' (layer {self.name!r})")
        if router == "logsumexp":
            self.router_constraints.check_group_probability(self.name)
            if num_groups < self.top_k:
                raise ValueError(
                    f"router='logsumexp' cannot choose top_k={self.top_k} of {num_groups} groups (layer "
                    f"{self.name!r}); keep at least {self.top_k} or use router='redirect'"
                )
        elif self.router_mode == "logsumexp" and expert_map != list(range(num_groups)):
            raise ValueError(
                f"layer {self.name!r} routes among groups already: its choice of groups cannot be "
                "redirected; use router='logsumexp'"
            )

    @property
    def device(self) -> torch.device:
        """Where the experts are."""
        return next(self.experts_module.parameters()).device

    def set_expert_groups(self, group_of_E: Sequence[int], *, renormalises: bool, scale: float) -> None:
        """Route among M groups of the router's E rows, or of the groups that they form already."""
        clear_expert_map(self.redirected_module)
        groups = torch.tensor(list(group_of_E), dtype=torch.long, device=self.device)
        if self.router_mode == "logsumexp":
            groups = groups[self.router.expert_group]
        set_group_router(
            self.router, groups, num_groups=self.num_physical_experts, renormalises=renormalises, scale=scale
        )

    def set_expert_map(self, expert_map: Sequence[int]) -> None:
        """Send logical to physical experts; the identity removes the map."""
        clear_expert_map(self.redirected_module)
        if list(expert_map) == list(range(self.num_physical_experts)):
            return
        weightless = range(self.num_physical_experts, self.num_physical_experts + self._num_weightless)
        full = torch.tensor([*expert_map, *weightless], dtype=torch.long, device=self.device)
        set_expert_map(self.redirected_module, full, self.redirect_hook)
        skip_absent_choices(self.experts_module, self.num_physical_experts, self.top_k)

    def check_removal(self, keep: Sequence[int]) -> None:
        """Refuse what `remove_experts` could not do, before anything is touched.

        Raises:
            ValueError: As `remove_experts` says.
        """
        if self.router_mode == "logsumexp":
            raise ValueError(
                f"layer {self.name!r} routes among {self.num_experts} groups by several router rows each "
                "(router='logsumexp'); there is no single row of a group to keep; use the moekit form"
            )
        sizes = {"num_experts": self.num_experts, "top_k": self.top_k}
        self.router_constraints.check(keep, layer=self.name, **sizes)

    def remove_experts(self, keep: Sequence[int], *, check: bool = True) -> None:
        """Keep only some experts, and only their rows of the router: the stock form.

        Args:
            keep: Logical experts to keep, in the order in which they are to stand. In a merged layer a
                kept expert brings the weights of its group.
            check: Whether to ask the router's constraints; loading a checkpoint need not.

        Raises:
            ValueError: Fewer than top-k, an expert twice or out of range, a group-limited router whose
                groups would differ in size, or a router of groups, which have several rows each.
        """
        if check:
            self.check_removal(keep)
        present = self.experts()
        old_map = list(range(len(present))) if self.expert_map is None else self.expert_map.tolist()
        num_old = self.num_experts
        clear_expert_map(self.redirected_module)
        served = {old_map[e]: i for i, e in reversed(list(enumerate(keep)))}
        new_ids = [served.get(old_map[e], e % len(keep)) for e in range(num_old)]
        write_experts(self.storage, [present[old_map[e]] for e in keep])
        reduce_router(self, num_old, list(keep), new_ids)
