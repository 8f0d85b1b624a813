"""One batch of completions, token by token."""

# P distinct prompts, B completions, R of them still in the batch, S prompt positions, N new tokens,
# V vocabulary, E end tokens

from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DummyLayer

from .growing_cache import GrowingLayer, GrowingSlidingLayer, growing_cache
from .sampling import draw_tokens
from .settings import SamplingSettings
from .stopping import StopTexts

# Finished rows leave the batch when they are at least this share of it.
COMPACTION_SHARE = 0.25
# Steps between two looks at which rows are finished; each makes the host wait for an accelerator.
STEPS_BETWEEN_LOOKS = {"cpu": 1}
DEFAULT_STEPS_BETWEEN_LOOKS = 8
# Cache layers of attention that leaves padding out.
MASKED_LAYERS = (GrowingLayer, GrowingSlidingLayer, DummyLayer)


class CachedModel:
    """A model behind its key-value cache: prompts in, then one token a step.

    The cache holds one row for each distinct prompt until `select` makes one row for each completion. Of a
    model that keeps a cache of its own kind no rows are selected: each is prefilled, and all stay to the end.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model
        if not isinstance(model, GenerationMixin) or model.config.is_encoder_decoder:
            raise ValueError(f"{type(model).__name__} does not continue text; use a causal language model")
        parameters = signature(model.forward).parameters
        self.cache_name = "past_key_values" if "past_key_values" in parameters else "cache_params"
        if self.cache_name not in parameters:
            raise ValueError(
                f"{type(model).__name__} takes no cache (past_key_values), so each token would cost a "
                "forward of the whole text; use a causal language model that has one"
            )
        self.takes_positions = "position_ids" in parameters
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self.can_select = self.model._supports_default_dynamic_cache()
        self.cache: Any = None
        self.mask_RS: Tensor | None = None
        self.positions_R1: Any = None
        self.length = 0

    @property
    def pads(self) -> bool:
        """Whether prompts of different lengths can share a batch.

        Full and sliding attention mask the padding; a recurrent state reads it, and sparse attention (an
        indexer) spends its choices on it.
        """
        layers = growing_cache(self.model.config).layers
        return self.can_select and all(type(layer) in MASKED_LAYERS for layer in layers)

    def prefill(self, ids_PS: Tensor, mask_PS: Tensor, max_new_tokens: int) -> Tensor:
        """Logits ``[P, V]`` of the first token after each left-padded prompt."""
        self.length = ids_PS.shape[1]
        self.cache = growing_cache(self.model.config) if self.can_select else None
        positions_PS = (mask_PS.cumsum(1) - 1).clamp_(min=0)
        self.positions_R1 = positions_PS[:, -1:]
        # Without padding there is nothing to mask, and attention takes a faster path.
        self.mask_RS = None
        if not mask_PS.all():
            self.mask_RS = torch.nn.functional.pad(mask_PS, (0, max_new_tokens), value=1)
        return self._forward(ids_PS, positions_PS)

    def step(self, tokens_R: Tensor) -> Tensor:
        """Logits ``[R, V]`` after one more token of each row."""
        self.length += 1
        self.positions_R1 = self.positions_R1 + 1
        return self._forward(tokens_R.unsqueeze(1), self.positions_R1)

    def select(self, rows: Tensor) -> None:
        """Go on with these rows, which may repeat."""
        # `reorder_cache` takes any rows, and every kind of cache layer has it.
        self.cache.reorder_cache(rows)
        self.positions_R1 = self.positions_R1[rows]
        if self.mask_RS is not None:
            self.mask_RS = self.mask_RS[rows]

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        inputs: dict[str, Any] = {self.cache_name: self.cache, **self.last_only}
        if self.takes_positions:
            inputs["position_ids"] = positions
        if self.mask_RS is not None:
            inputs["attention_mask"] = self.mask_RS[:, : self.length]
        output = self.model(input_ids=ids, use_cache=True, **inputs)
        self.cache = output.get(self.cache_name)
        if self.cache is None:
            raise ValueError(f"{type(self.model).__name__} returned no {self.cache_name}; it needs a cache")
        return output.logits[:, -1]


class Completions:
    """What a batch has written so far.

    Attributes:
        ids_BN: Tokens; those behind a row's length mean nothing.
        logprobs_BN: Their log-probs.
        lengths_B: Tokens of each row.
        is_finished_B: Whether it ended before it met the length limit.
    """

    def __init__(self, uniforms_BN: Tensor, device: torch.device) -> None:
        num_rows, max_new_tokens = uniforms_BN.shape
        self.uniforms_BN = uniforms_BN.to(device)
        self.ids_BN = torch.zeros((num_rows, max_new_tokens), dtype=torch.long, device=device)
        self.logprobs_BN = torch.zeros((num_rows, max_new_tokens), device=device)
        self.lengths_B = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.is_finished_B = torch.zeros(num_rows, dtype=torch.bool, device=device)


def decode(
    model: CachedModel,
    logits_RV: Tensor,
    uniforms_BN: Tensor,
    settings: SamplingSettings,
    eos_E: Tensor,
    stop_texts: StopTexts | None,
) -> Completions:
    """Write completions until all have ended or met the length limit.

    Args:
        model: Prefilled, with one row for each completion.
        logits_RV: Of the first token of each.
        uniforms_BN: The random numbers, one for each token.
        settings: How tokens are drawn.
        eos_E: Each of these tokens ends a completion.
        stop_texts: So do these texts.
    """
    device = logits_RV.device
    written = Completions(uniforms_BN, device)
    rows_R = torch.arange(len(uniforms_BN), device=device)
    is_done_R = torch.zeros_like(rows_R, dtype=torch.bool)
    interval = STEPS_BETWEEN_LOOKS.get(device.type, DEFAULT_STEPS_BETWEEN_LOOKS)
    for step in range(settings.max_new_tokens):
        tokens_R, logprobs_R = draw_tokens(logits_RV, written.uniforms_BN[rows_R, step], settings)
        written.ids_BN[rows_R, step] = tokens_R
        written.logprobs_BN[rows_R, step] = logprobs_R
        written.lengths_B[rows_R] += ~is_done_R
        is_done_R |= (tokens_R.unsqueeze(1) == eos_E).any(1)
        if stop_texts is not None:
            _mark_stopped(is_done_R, written.ids_BN, rows_R, step, stop_texts)
        if step + 1 == settings.max_new_tokens:
            break
        if (step + 1) % interval == 0 and (num_done := int(is_done_R.sum())):
            if num_done == len(rows_R):
                break
            if model.can_select and num_done >= COMPACTION_SHARE * len(rows_R):
                written.is_finished_B[rows_R] = is_done_R
                kept_R = (~is_done_R).nonzero().squeeze(1)
                model.select(kept_R)
                rows_R, tokens_R, is_done_R = rows_R[kept_R], tokens_R[kept_R], is_done_R[kept_R]
        logits_RV = model.step(tokens_R)
    written.is_finished_B[rows_R] = is_done_R
    return written


def _mark_stopped(
    is_done_R: Tensor, ids_BN: Tensor, rows_R: Tensor, step: int, stop_texts: StopTexts
) -> None:
    open_R = (~is_done_R).nonzero().squeeze(1)
    if len(open_R):
        start = max(0, step + 1 - stop_texts.tail_length)
        said = stop_texts.are_in(ids_BN[rows_R[open_R], start : step + 1])
        is_done_R[open_R] = torch.tensor(said, device=is_done_R.device)
