"""Router replay: the experts chosen in one forward pass are chosen again in another.

A router that has learned since, or that computes in another order, chooses other experts for some tokens;
ratios of log-probs then measure that and not the policy. Only the choice is replayed. Its weights are the
live router's own scores of the recorded experts, so the router goes on learning.

Reference: Ma et al., Stabilizing MoE Reinforcement Learning by Aligning Training and Inference Routers,
arXiv:2510.11370.
"""

# T tokens with padding, N tokens without, B rows, S sequence, E logical experts, K active experts

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor, nn
from transformers import PreTrainedModel

from .discovery import UnsupportedModelError, expert_layers
from .layer import ExpertLayer

SCORING = ("softmax", "sigmoid")
"""Rules whose weights can be given to any choice."""
SMALLEST_SUM = 1e-20
"""DeepSeek-V3's, of sigmoids that are renormalised."""


@dataclass(kw_only=True)
class RoutedExperts:
    """Which experts a forward pass chose for its tokens; fits the same rows however they are padded.

    Attributes:
        choices: For each layer the logical experts ``[N, K]`` of all tokens, row after row, in the smallest
            integers that hold them; on the CPU.
        lengths: ``[B]`` tokens of each row.
    """

    choices: dict[str, Integer[Tensor, "N _"]] = field(default_factory=dict)
    lengths: Int[Tensor, " B"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))

    def __len__(self) -> int:
        return len(self.lengths)

    def select(self, rows: Sequence[int] | Int[Tensor, " R"]) -> "RoutedExperts":
        """Some rows, in the given order."""
        index = torch.as_tensor(rows, dtype=torch.long, device="cpu")
        lengths = self.lengths[index]
        starts = (self.lengths.cumsum(0) - self.lengths)[index]
        # Of each token of the selection its place in its row, and from that its place among all tokens.
        within_N = torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        tokens_N = starts.repeat_interleave(lengths) + within_N
        return RoutedExperts(
            choices={name: ids_NK[tokens_N] for name, ids_NK in self.choices.items()}, lengths=lengths
        )


def join_choices(parts: Sequence[RoutedExperts]) -> RoutedExperts:
    """The rows of several recordings, one after another.

    Raises:
        ValueError: They are of different layers, or there are none.
    """
    if not parts:
        raise ValueError("there are no recordings to join")
    names = list(parts[0].choices)
    for part in parts:
        if list(part.choices) != names:
            raise ValueError(f"recordings of the layers {names} and {list(part.choices)} do not go together")
    return RoutedExperts(
        choices={name: torch.cat([part.choices[name] for part in parts]) for name in names},
        lengths=torch.cat([part.lengths for part in parts]),
    )


def check_replay(layers: Sequence[ExpertLayer]) -> None:
    """Refuse routers whose choice cannot be replayed; to be called before a model is divided or trained.

    Raises:
        UnsupportedModelError: A router does not return (logits, weights, ids), or weighs its choices by an
            unknown rule.
    """
    for layer in layers:
        rule = layer.router_constraints
        if not rule.returns_choices or rule.scoring not in SCORING:
            raise UnsupportedModelError(
                f"the choices of layer {layer.name!r} cannot be replayed: {type(layer.router).__name__} must "
                f"return (logits, weights, ids), weighed by a softmax or sigmoid of the logits; its rule: "
                f"{rule.scoring!r}, returns choices: {rule.returns_choices}; do without router replay"
            )


@contextmanager
def record_choices(
    model: PreTrainedModel, layers: Sequence[ExpertLayer] | None = None
) -> Iterator[RoutedExperts]:
    """Record the experts that one forward pass chooses.

    Args:
        model: Is called once inside the context, with an attention mask ``[B, S]``.
        layers: Its expert layers; found by default, which takes time and fails once the model is divided.

    Yields:
        The choices, there once the forward pass is over.

    Raises:
        UnsupportedModelError: See `check_replay`.
        ValueError: The model is called twice or without such a mask, or is recorded or replayed already.
    """
    layers = _checked(model, layers)
    forward = _Forward()
    found = RoutedExperts()
    with _watched(model, layers, forward, [_Recorder(layer, forward, found) for layer in layers]):
        yield found
        if forward.index_N is None:
            raise ValueError("nothing was recorded: the model was not called inside of record_choices")
    found.lengths = forward.lengths_B.cpu()
    ran = found.choices
    found.choices = {layer.name: ran[layer.name].cpu() for layer in layers if layer.name in ran}


@contextmanager
def replay_choices(
    model: PreTrainedModel, choices: RoutedExperts, layers: Sequence[ExpertLayer] | None = None
) -> Iterator[None]:
    """Choose the recorded experts in one forward pass, and in its repetition by gradient checkpointing.

    The backward pass belongs inside the context. Padding goes where the live router sends it.

    Args:
        model: Is called once inside the context, with an attention mask ``[B, S]``.
        choices: Of the same rows; padding may differ.
        layers: See `record_choices`.

    Raises:
        UnsupportedModelError: See `check_replay`.
        ValueError: The rows have other lengths than the recorded ones, the layers are others, or as
            `record_choices`.
    """
    layers = _checked(model, layers)
    if (names := [layer.name for layer in layers]) != list(choices.choices):
        raise ValueError(f"recorded were the layers {list(choices.choices)}; the model has {names}")
    forward = _Forward(choices.lengths)
    hooks = [_Replayer(layer, forward, choices.choices[layer.name]) for layer in layers]
    with _watched(model, layers, forward, hooks):
        yield


def _checked(model: PreTrainedModel, layers: Sequence[ExpertLayer] | None) -> Sequence[ExpertLayer]:
    layers = expert_layers(model) if layers is None else layers
    for layer in layers:  # before the rules are asked for, which are found by watching the routers
        if any(isinstance(hook, _Recorder | _Replayer) for hook in layer.router._forward_hooks.values()):
            raise ValueError(
                f"layer {layer.name!r} is being recorded or replayed already; leave that context first"
            )
    check_replay(layers)
    return layers


@contextmanager
def _watched(
    model: PreTrainedModel, layers: Sequence[ExpertLayer], forward: "_Forward", hooks: Sequence[Any]
) -> Iterator[None]:
    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(forward.start, with_kwargs=True).remove)
        stack.callback(model.register_forward_hook(forward.stop, always_call=True).remove)
        for layer, hook in zip(layers, hooks, strict=True):
            stack.callback(layer.router.register_forward_hook(hook).remove)
        yield


class _Forward:
    """The one forward pass of a context: where its tokens are.

    Args:
        expected_B: Tokens that its rows must have.
    """

    def __init__(self, expected_B: Int[Tensor, " B"] | None = None) -> None:
        self.expected_B = expected_B
        self.mask_T: Tensor
        self.lengths_B: Tensor
        self.index_N: Tensor | None = None
        self.is_running = False

    def start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model."""
        if self.index_N is not None:
            raise ValueError(
                "the model was called twice in one recording or replay; use a context for each call"
            )
        bound = signature(module.forward).bind_partial(*args, **kwargs).arguments
        mask_BS = (bound | bound.get("kwargs", {})).get("attention_mask")
        if not isinstance(mask_BS, Tensor) or mask_BS.ndim != 2:
            raise ValueError(
                "router replay needs an attention mask [batch, length], which says what padding is"
            )
        self.mask_T = mask_BS.flatten() != 0
        self.lengths_B = (mask_BS != 0).sum(1)
        if self.expected_B is not None and self.lengths_B.tolist() != self.expected_B.tolist():
            raise ValueError(
                f"the recorded rows have {self.expected_B.tolist()} tokens and these have "
                f"{self.lengths_B.tolist()}; replay the rows that were recorded, in the same order"
            )
        self.index_N = self.mask_T.nonzero().squeeze(1)
        self.is_running = True

    def stop(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the model; what runs later repeats it for gradient checkpointing."""
        self.is_running = False

    def tokens(self, layer: ExpertLayer, ids_TK: Tensor) -> tuple[Bool[Tensor, " T"], Int[Tensor, " N"]]:
        """Which of a layer's tokens count, as a mask and as places."""
        if self.index_N is None:
            raise ValueError(
                f"layer {layer.name!r} ran, but not in a call of the model whose choices are replayed"
            )
        if len(ids_TK) != len(self.mask_T):
            raise ValueError(
                f"layer {layer.name!r} routed {len(ids_TK)} tokens, and the attention mask is of "
                f"{len(self.mask_T)}"
            )
        return self.mask_T.to(ids_TK.device), self.index_N.to(ids_TK.device)


class _Recorder:
    """Forward hook of a router."""

    def __init__(self, layer: ExpertLayer, forward: _Forward, found: RoutedExperts) -> None:
        self.layer, self.forward, self.found = layer, forward, found
        self.dtype = torch.uint8 if layer.num_experts <= 256 else torch.int16

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ids_TK = output[2]
        _, index_N = self.forward.tokens(self.layer, ids_TK)
        if not self.forward.is_running:
            return
        if self.layer.name in self.found.choices:
            raise ValueError(
                f"layer {self.layer.name!r} routed twice in one forward pass; its choices have no place"
            )
        self.found.choices[self.layer.name] = ids_TK.index_select(0, index_N).to(self.dtype)


class _Replayer:
    """Forward hook of a router."""

    def __init__(self, layer: ExpertLayer, forward: _Forward, choices_NK: Integer[Tensor, "N K"]) -> None:
        self.layer, self.forward = layer, forward
        self.choices_NK = choices_NK

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]) -> tuple[Any, ...]:
        logits_TE, weights_TK, ids_TK, *rest = output
        mask_T, _ = self.forward.tokens(self.layer, ids_TK)
        if self.choices_NK.shape[1] != ids_TK.shape[1]:
            raise ValueError(
                f"layer {self.layer.name!r} chooses {ids_TK.shape[1]} experts for each token, and "
                f"{self.choices_NK.shape[1]} were recorded; keep top_k between recording and replay"
            )
        recorded_NK = self.choices_NK.to(ids_TK.device, ids_TK.dtype)
        replayed_TK = ids_TK.masked_scatter(mask_T[:, None], recorded_NK)
        scores_TK = replayed_weights(self.layer, self.layer.as_logits(logits_TE), replayed_TK)
        # The family's own order of rounding, to the last bit, wherever the live router agrees.
        agrees_T1 = (replayed_TK == ids_TK).all(1, keepdim=True)
        replayed_weights_TK = torch.where(agrees_T1, weights_TK, scores_TK.to(weights_TK.dtype))
        return (logits_TE, replayed_weights_TK, replayed_TK, *rest)


def replayed_weights(
    layer: ExpertLayer, logits_TE: Float[Tensor, "T E"], ids_TK: Int[Tensor, "T K"]
) -> Float[Tensor, "T K"]:
    """Weights that a router's own rule gives to experts that it may not have chosen.

    They come from the scores of all experts: those of a router that has set the others to 0 would give them
    neither weight nor gradient.
    """
    rule = layer.router_constraints
    wide_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    chosen_TK = wide_TE.gather(1, ids_TK)
    if rule.scoring == "softmax":
        # Renormalised, a softmax of all is the softmax of the chosen, which cannot underflow.
        weights_TK = (
            chosen_TK.softmax(-1)
            if rule.renormalises
            else (chosen_TK - wide_TE.logsumexp(-1, keepdim=True)).exp()
        )
    else:
        weights_TK = chosen_TK.sigmoid()
        if rule.renormalises:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp_min(SMALLEST_SUM)
    return weights_TK * rule.scale
