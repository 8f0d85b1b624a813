"""Hash Layers: a token's experts follow from its id alone, by a fixed random table."""

# T tokens, D hidden (model) width, E experts, K active experts, V vocabulary

from inspect import signature
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel


def hash_table(vocab_size: int, num_experts: int, generator: torch.Generator) -> Int[Tensor, "V E"]:
    """Draw a random, balanced table of experts by token id.

    Every row is a permutation of the experts. In every column all experts occur equally often, up to one:
    the tokens, in random order, are dealt in hands of E, and each hand gets the E rotations of a permutation
    of its own. So the first K columns are K experts for each token, balanced over the vocabulary, for any K.

    Args:
        vocab_size: V.
        num_experts: E.
        generator: On the CPU.
    """
    hands = -(-vocab_size // num_experts)
    order_HE = torch.rand(hands, num_experts, generator=generator).argsort(1)
    places_E = torch.arange(num_experts)
    rotations_EE = (places_E[:, None] + places_E) % num_experts
    dealt_VE = order_HE[:, rotations_EE].flatten(0, 1)[:vocab_size]
    return dealt_VE[torch.randperm(vocab_size, generator=generator)]


class HashRouter(nn.Module):
    """Chooses K experts by token id, each of weight ``scale / K``; nothing is learned or computed.

    The layer does not see token ids, so `hand_out_token_ids` makes the model give them to its routers.

    Attributes:
        table: ``[V, E]`` integers, saved with the model: a token's experts in order of preference.
        top_k: K.
        token_ids: Of the forward that is running, or ran last: gradient checkpointing repeats it.

    Args:
        num_experts: E.
        vocab_size: V.
        combine: ``softmax`` or ``uniform``, which are the same here, where no expert is preferred.
        scale: What the weights sum to.
        like: A tensor whose device the table takes.

    Raises:
        ValueError: ``combine="residual"``, which needs probabilities.

    Reference: Roller et al., Hash Layers For Large Sparse Models, arXiv:2106.04426.

    *Departs from the paper*: its balanced hash equalises the load on the training data by the tokens'
    frequencies; this one is balanced over the vocabulary. For K > 1 the paper's MultiHash joins K pieces of
    experts, here K whole experts are averaged. The "hash gate" of the SMoE-Dropout release is indexed by the
    position in the flattened batch and does not know the token at all; this follows the Hash Layers.
    """

    kind = "hash"
    table: Tensor

    def __init__(
        self, num_experts: int, vocab_size: int, *, combine: str = "uniform", scale: float = 1.0, like: Tensor
    ) -> None:
        super().__init__()
        check_equal_weights(self.kind, combine)
        self.num_experts = num_experts
        self.top_k = num_experts
        self.combine = combine
        self.scale = scale
        # Small, and of a type that processes can send each other, unlike those of 16 bits.
        dtype = torch.uint8 if num_experts <= 256 else torch.int32
        self.register_buffer("table", torch.empty(vocab_size, num_experts, dtype=dtype, device=like.device))
        self.token_ids: Tensor | None = None
        self.is_running = False
        self.num_repeatable = 0

    def extra_repr(self) -> str:
        """Sizes."""
        return f"num_experts={self.num_experts}, top_k={self.top_k}, vocab_size={len(self.table)}"

    @torch.no_grad()
    def draw(self, generator: torch.Generator, logit_std: float = 0.0) -> None:
        """Draw the table; there are no logits to deviate."""
        vocab_size, num_experts = self.table.shape
        self.table.copy_(hash_table(vocab_size, num_experts, generator))

    def forward(
        self, hidden_states: Float[Tensor, "T D"]
    ) -> tuple[Float[Tensor, "T E"], Float[Tensor, "T K"], Int[Tensor, "T K"]]:
        """Return logits that rank the experts as the table does (0, -1, ...), routing weights and expert ids.

        Raises:
            ValueError: The ids of these tokens are not known.
        """
        ids_T = self._ids_of(len(hidden_states)).to(self.table.device)
        experts_TE = self.table[ids_T].long()
        ranks_E = -torch.arange(self.num_experts, device=experts_TE.device, dtype=hidden_states.dtype)
        logits_TE = hidden_states.new_empty(experts_TE.shape).scatter_(
            1, experts_TE, ranks_E.expand(experts_TE.shape)
        )
        ids_TK = experts_TE[:, : self.top_k]
        return logits_TE, hidden_states.new_full(ids_TK.shape, self.scale / self.top_k), ids_TK

    def _ids_of(self, num_tokens: int) -> Tensor:
        if self.token_ids is None:
            raise ValueError(
                "a hash router needs the tokens' ids: call the model with input_ids, not this layer by itself"
            )
        if self.token_ids.numel() != num_tokens:
            raise ValueError(
                f"a hash router got {num_tokens} tokens where input_ids has {self.token_ids.numel()}: this "
                "model does not keep one hidden state for each token id"
            )
        self.num_repeatable += 1 if self.is_running else -1
        if self.num_repeatable < 0:
            raise ValueError(
                "gradient checkpointing repeats a forward whose token ids are gone: with a hash router, do "
                "the backward of one forward before the next, or join both batches to one"
            )
        return self.token_ids.flatten()


def check_equal_weights(router: str, combine: str) -> None:
    """Refuse a rule that a router without probabilities cannot follow.

    Raises:
        ValueError: Says which.
    """
    if combine not in ("softmax", "uniform"):
        raise ValueError(
            f"combine={combine!r} needs probabilities, which router={router!r} does not have; use uniform"
        )


def vocabulary_size(config: Any) -> int:
    """V of a model's config.

    Raises:
        ValueError: The model reads no tokens.
    """
    size = getattr(config.get_text_config(), "vocab_size", None)
    if type(size) is not int:
        raise ValueError(
            f"router='hash' chooses by token id, but the config of {config.model_type!r} has no vocab_size; "
            "use another router"
        )
    return size


def hand_out_token_ids(model: PreTrainedModel) -> None:
    """Let every forward of a model, from now on, tell its hash routers the ids of its tokens.

    The hooks are on the innermost Transformers models that hold the routers, so a decoder behind an encoder
    hands out its own ids, and a base model may be called without its head.
    """
    readers: dict[nn.Module, nn.Module] = {}
    for module in model.modules():  # outer models come before inner ones
        if isinstance(module, PreTrainedModel):
            readers |= dict.fromkeys(_hash_routers(module), module)
    for reader in dict.fromkeys(readers.values()):
        if _start not in reader._forward_pre_hooks.values():
            reader.register_forward_pre_hook(_start, with_kwargs=True)
            reader.register_forward_hook(_stop, always_call=True)


# The hooks find the routers anew each time: closures over them would be shared by copies of the model.
def _hash_routers(model: nn.Module) -> list[HashRouter]:
    return [module for module in model.modules() if isinstance(module, HashRouter)]


def _start(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    routers = _hash_routers(model)
    if not routers:
        return  # the model has been made dense again
    ids = signature(model.forward).bind_partial(*args, **kwargs).arguments.get("input_ids")
    if ids is None:
        raise ValueError(
            f"{type(model).__name__} has hash routers, which need input_ids; embeddings or pixels have no ids"
        )
    vocab_size = vocabulary_size(model.config)
    for router in routers:
        if vocab_size > len(router.table):
            raise ValueError(
                f"the vocabulary grew to {vocab_size} tokens, the hash table has {len(router.table)}; resize "
                "the embeddings before to_smoe_dropout"
            )
        router.token_ids, router.is_running, router.num_repeatable = ids, True, 0


def _stop(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    for router in _hash_routers(model):
        router.is_running = False
