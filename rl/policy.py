"""The policy in training: a causal language model whose forward gives statistics of completions' tokens."""

# B completions, S sequence, L completion positions, N tokens of completions, D hidden width, V vocabulary

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from ..moe.discovery import UnsupportedModelError, expert_layers
from ..moe.expert_load import collect_expert_load
from ..moe.language_head import PROBE_TOKENS, hidden_states, logit_scale
from ..moe.layer import ExpertLayer
from ..moe.wrapping import WrapsModel
from .algorithm import TokenStatistics
from .batch import PolicyBatch
from .shared_prompts import Arrangement, can_share_prompts, plain_arrangement, shared_arrangement
from .token_logprobs import Entropies, token_logprobs

RANDOM_NAMES = ("dropout", "layerdrop", "drop_path", "jitter")
"""In the names of modules' attributes that are probabilities or widths of noise."""
SAME = 0.05
"""Relative difference of logits up to which two passes are the same but for the order of additions."""
LOGIT_BYTES = 64 * 2**20
"""Of the logits of one chunk in single precision; a few times as much is in use at once."""


class Policy(WrapsModel):
    """A causal language model whose forward gives log-probs of tokens, whatever shards its weights.

    Logits are never there but in chunks, and of the completions' tokens alone.

    Attributes:
        model: The language model, or PEFT's around it.
        head: Its output embeddings.
        scale: What becomes of the head's output.
        layers: Its expert layers; none in a dense model.
        shares_prompts: Whether it reads a prompt once for all its completions, where that saves work.
        with_router_loss: See below.
        logit_bytes: See below.
        is_whole: Whether weights that processes have divided are whole for now.

    Args:
        model: The language model, or a PEFT model with layers of its own in it (LoRA and its kin).
        with_router_loss: Whether passes with gradient also give the load-balancing loss of the experts.
        share_prompts: Whether a prompt may be read once for all its completions; no router loss then.
        logit_bytes: Most bytes of a chunk of logits in single precision.

    Raises:
        ValueError: PEFT that changes the prompt.
        NonFiniteLogitsError: The model says NaN or infinity.
        UnreadableHeadError: There is no head, or the logits are not its output with a factor and a softcap.
        UnsupportedModelError: A router loss is wanted and there are no experts that can be served.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        with_router_loss: bool = False,
        share_prompts: bool = True,
        logit_bytes: int = LOGIT_BYTES,
    ) -> None:
        super().__init__()
        if logit_bytes < 1:
            raise ValueError(f"logit_bytes={logit_bytes} must be at least 1")
        _check_peft(model)
        self.model = model
        self.with_router_loss = with_router_loss
        self.logit_bytes = logit_bytes
        self.is_whole = False
        # Found once: all of it looks through the modules of the model, and needs whole weights.
        self.scale = logit_scale(self.plain)
        self.layers = _layers(self.plain, are_needed=with_router_loss)
        self._options = _options(self.plain)
        self._takes_positions = "position_ids" in inspect.signature(self.plain.forward).parameters
        self.shares_prompts = (
            share_prompts
            and not with_router_loss
            and self._takes_positions
            and can_share_prompts(self.plain, self.head)
        )
        self.train(model.training)

    @property
    def plain(self) -> PreTrainedModel:
        """The language model itself, with adapters in its layers if there are any."""
        model: Any = self.model
        return model.get_base_model() if is_peft(model) else model

    @property
    def head(self) -> nn.Module:
        """The plain model's output embeddings, an adapter's layer if it has one."""
        return cast(nn.Module, self.plain.get_output_embeddings())

    def forward(
        self,
        input_ids: Int[Tensor, "B S"],
        attention_mask: Shaped[Tensor, "B S"],
        *,
        num_completion: int,
        temperature: float,
        with_entropies: bool = True,
        with_entropy_gradient: bool = False,
        with_mean_vocab: bool = False,
    ) -> dict[str, Tensor]:
        """Statistics of the last `num_completion` positions, 0 for padding.

        Args:
            input_ids: Prompts, padded on the left, before completions, padded on the right.
            attention_mask: 0 for padding.
            num_completion: L.
            temperature: What the logits are divided by.
            with_entropies: Whether entropies are wanted.
            with_entropy_gradient: Whether they carry gradient.
            with_mean_vocab: Whether the vocabulary means are wanted.

        Returns:
            ``logprobs`` ``[B, L]``, and if wanted ``entropies`` and ``mean_vocab_logprobs`` like them and
            ``router_loss``, a scalar.

        Raises:
            ValueError: A temperature of 0 or less, or completions that leave no room for a prompt.
        """
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} must be above 0")
        num_prompt = input_ids.shape[1] - num_completion
        if num_completion < 1 or num_prompt < 1:
            raise ValueError(
                f"num_completion={num_completion} of {input_ids.shape[1]} positions must leave one to the "
                "prompt"
            )
        arrangement = self.arrange(input_ids, attention_mask, num_completion)
        inputs = {**arrangement.inputs(), **self._options}
        with self._router_loss(arrangement.weights) as router_loss:
            hidden_USD = hidden_states(self.plain, self.head, inputs)
        rows_N, columns_N = attention_mask[:, num_prompt:].nonzero(as_tuple=True)
        chunk_size = max(1, self.logit_bytes // (4 * self.config.get_text_config().vocab_size))
        entropies: Entropies = "gradient" if with_entropy_gradient else "value" if with_entropies else "none"
        found = token_logprobs(
            arrangement.before(hidden_USD, rows_N, columns_N),
            input_ids[rows_N, columns_N + num_prompt],
            self._logits,
            temperature=temperature,
            chunk_size=chunk_size,
            num_chunks=self._num_chunks(len(rows_N), chunk_size),
            entropies=entropies,
            with_mean_vocab=with_mean_vocab,
        )
        shape = len(input_ids), num_completion
        said = {
            name: value_N.new_zeros(shape).index_put((rows_N, columns_N), value_N)
            for name, value_N in found.items()
        }
        return said if router_loss is None else said | {"router_loss": router_loss()}

    def arrange(self, input_ids: Tensor, attention_mask: Tensor, num_completion: int) -> Arrangement:
        """How the model reads a batch; arguments as of the forward."""
        shared = None
        if self.shares_prompts:
            shared = shared_arrangement(input_ids, attention_mask, num_completion)
        plain = shared or plain_arrangement(input_ids, attention_mask, num_completion)
        return plain if self._takes_positions else replace(plain, position_ids=None)

    @contextmanager
    def _router_loss(self, mask_BS: Tensor) -> Iterator[Any]:
        if not (self.with_router_loss and torch.is_grad_enabled()):
            yield None
            return
        with collect_expert_load(self.layers, mask_BS) as load:
            yield load

    def _logits(self, hidden_nD: Tensor) -> Tensor:
        product_nV = self.head(hidden_nD)
        return self.scale(product_nV.to(torch.promote_types(product_nV.dtype, torch.float32)))

    def _num_chunks(self, num_rows: int, chunk_size: int) -> int:
        """Calls of the head; as many on each process, where each call gathers its weights from all."""
        needed = max(1, -(-num_rows // chunk_size))
        head = self.head
        is_divided = isinstance(head, FSDPModule) or any(
            hasattr(weight, "ds_id") for weight in head.parameters()
        )
        if self.is_whole or not is_divided:
            return needed
        most = torch.tensor(needed, device=self.plain.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)


def is_peft(model: nn.Module) -> bool:
    """Whether it is PEFT's model around another."""
    return hasattr(model, "disable_adapter") and hasattr(model, "get_base_model")


def _check_peft(model: Any) -> None:
    if is_peft(model) and (
        model.active_peft_config.is_prompt_learning or model.active_peft_config.is_adaption_prompt
    ):
        raise ValueError(
            f"{type(model.active_peft_config).__name__} learns a prompt; a policy can have adapters in its "
            "layers only: take LoRA or its kin"
        )


def _layers(model: PreTrainedModel, *, are_needed: bool) -> list[ExpertLayer]:
    try:
        return expert_layers(model)
    except UnsupportedModelError:
        if are_needed:
            raise
        return []


def _options(model: PreTrainedModel) -> dict[str, Any]:
    """Inputs that are always the same."""
    options: dict[str, Any] = {"use_cache": False}
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        options["output_router_logits"] = False  # the model's own router loss, which nobody would read
    return options


def policy_inputs(batch: PolicyBatch) -> dict[str, Any]:
    """What the forward of a `Policy` reads of a batch."""
    return {
        "input_ids": torch.cat([batch.prompt_ids, batch.completion_ids], 1),
        "attention_mask": torch.cat([batch.prompt_mask, batch.token_mask], 1).long(),
        "num_completion": batch.completion_ids.shape[1],
    }


def statistics_of(
    policy: nn.Module,
    batch: PolicyBatch,
    *,
    temperature: float,
    with_entropy_gradient: bool = False,
    with_mean_vocab: bool = False,
) -> TokenStatistics:
    """What a policy says of a batch, with gradient if gradients are on.

    Args:
        policy: A `Policy`, or what wraps it.
        batch: On the policy's device.
        temperature: Of sampling.
        with_entropy_gradient: Whether entropies carry gradient.
        with_mean_vocab: Whether the vocabulary means are wanted.

    Raises:
        ValueError: What wraps the policy has rounded its log-probs.
    """
    said = policy(
        **policy_inputs(batch),
        temperature=temperature,
        with_entropy_gradient=with_entropy_gradient,
        with_mean_vocab=with_mean_vocab,
    )
    check_precision(said)
    return TokenStatistics(**said)


def check_precision(said: dict[str, Tensor]) -> None:
    """Refuse log-probs that are too coarse for ratios.

    Raises:
        ValueError: They are in half precision.
    """
    if (dtype := said["logprobs"].dtype) in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"the policy's log-probs came back in {dtype}: set output_dtype=torch.float32 in FSDP's "
            "mixed-precision policy"
        )


def without_dropout(model: nn.Module) -> None:
    """Set every dropout and every noise of routers to 0, so that ratios are exact in training mode.

    The config, which is saved, stays as it is.

    Raises:
        ValueError: The model is still random in training mode; nothing could tell its ratios from noise.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and any(part in name for part in RANDOM_NAMES):
                setattr(module, name, 0.0)
    if _is_random(model):
        raise ValueError(
            f"{type(model).__name__} says something else each time in training mode, with all dropout off: "
            "its routers draw experts at random, or dropout is read from its config (set it to 0 there)"
        )


@torch.no_grad()
def _is_random(model: Any) -> bool:
    was_training = model.training
    ids_BS = torch.arange(PROBE_TOKENS, device=model.device)[None] % model.config.get_text_config().vocab_size
    model.train()
    try:
        first, second = (model(input_ids=ids_BS, use_cache=False).logits.double() for _ in range(2))
    finally:
        model.train(was_training)
    return not bool((first - second).abs().mean() <= SAME * first.abs().mean())
