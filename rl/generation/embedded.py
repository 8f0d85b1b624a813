"""Completions by the model in training itself: no second copy of the weights, nothing to synchronise."""

# P distinct prompts, B completions of a batch, S prompt positions, N new tokens, V vocabulary, E end tokens

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...moe.evaluating import evaluating
from .decoding import CachedModel, Completions, decode
from .generator import Sample, SampleRequest
from .sampling import request_uniforms
from .settings import SamplingSettings
from .stopping import StopTexts

Row = tuple[int, int]
"""A completion: number of its request, number of the sample in it."""


class EmbeddedGenerator:
    """Samples from a `transformers` model, which is left as it was found.

    Each distinct prompt of a batch is read once, however many completions it gets; finished completions leave
    the batch. The model runs in evaluation mode, which also switches gradient checkpointing off.

    Args:
        model: A causal language model; of one with PEFT adapters, `get_base_model()`.
        eos_token_ids: Each of these tokens ends a completion; may be empty.
        pad_token_id: Stands left of shorter prompts.
        tokenizer: Needed for stop texts only.
        max_batch: Most completions at a time.

    Raises:
        ValueError: `max_batch` is not positive, or the model cannot continue text.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_batch: int = 64,
    ) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch={max_batch} must be at least 1")
        CachedModel(model)  # refuses what cannot continue text with a cache
        self.model = model
        self.eos_token_ids = tuple(eos_token_ids)
        self.pad_token_id = pad_token_id
        self.tokenizer = tokenizer
        self.max_batch = max_batch

    def generate(self, requests: Sequence[SampleRequest], settings: SamplingSettings) -> list[list[Sample]]:
        """Sample what is requested; see `Generator`.

        A sample depends on its request's seed, its number, `max_new_tokens` and the model, not on the other
        requests or on `max_batch` (but for the rounding of the logits).

        Raises:
            ValueError: A prompt that does not fit the model, stop texts without a tokenizer, or logits that
                are not finite.
        """
        stop_texts = self._check(requests, settings)
        samples: dict[Row, Sample] = {}
        with evaluating(self.model):
            model = CachedModel(self.model)
            for batch in self._batches(requests, pads=model.pads):
                written = self._write(model, requests, batch, settings, stop_texts)
                samples.update(zip(batch, _samples(written, batch), strict=True))
        return [
            [samples[index, number] for number in range(request.num_samples)]
            for index, request in enumerate(requests)
        ]

    def _check(self, requests: Sequence[SampleRequest], settings: SamplingSettings) -> StopTexts | None:
        config = self.model.config.get_text_config()
        context = getattr(config, "max_position_embeddings", None)
        longest = max((len(request.prompt_ids) for request in requests), default=0)
        if context is not None and longest + settings.max_new_tokens > context:
            raise ValueError(
                f"the longest prompt has {longest} tokens; with max_new_tokens={settings.max_new_tokens} it "
                f"does not fit the model's context of {context}: shorten the prompts or max_new_tokens"
            )
        for index, request in enumerate(requests):
            if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < config.vocab_size:
                raise ValueError(
                    f"prompt {index} holds a token outside the model's vocabulary of {config.vocab_size}; "
                    "use the model's own tokenizer"
                )
        if not settings.stop:
            return None
        if self.tokenizer is None:
            raise ValueError("stop texts need the tokenizer: EmbeddedGenerator(..., tokenizer=...)")
        return StopTexts(self.tokenizer, settings.stop)

    def _batches(self, requests: Sequence[SampleRequest], *, pads: bool) -> Iterator[list[Row]]:
        """Rows of similar prompt length together; of equal length if the model cannot pad."""
        order = sorted(range(len(requests)), key=lambda index: len(requests[index].prompt_ids))
        batch: list[Row] = []
        length = 0
        for index in order:
            for number in range(requests[index].num_samples):
                differs = len(requests[index].prompt_ids) != length and not pads
                if batch and (differs or len(batch) == self.max_batch):
                    yield batch
                    batch = []
                length = len(requests[index].prompt_ids)
                batch.append((index, number))
        if batch:
            yield batch

    def _write(
        self,
        model: CachedModel,
        requests: Sequence[SampleRequest],
        batch: Sequence[Row],
        settings: SamplingSettings,
        stop_texts: StopTexts | None,
    ) -> Completions:
        wanted = [requests[index].prompt_ids for index, _ in batch]
        prompts = list(dict.fromkeys(wanted)) if model.can_select else wanted
        ids_PS, mask_PS = self._pad(prompts)
        logits_PV = model.prefill(ids_PS, mask_PS, settings.max_new_tokens)
        if len(prompts) != len(wanted):
            positions = {prompt: position for position, prompt in enumerate(prompts)}
            prompts_B = torch.tensor([positions[prompt] for prompt in wanted], device=logits_PV.device)
            model.select(prompts_B)
            logits_PV = logits_PV[prompts_B]
        uniforms_BN = _uniforms(requests, batch, settings.max_new_tokens)
        eos_E = torch.tensor(self.eos_token_ids, dtype=torch.long, device=logits_PV.device)
        return decode(model, logits_PV, uniforms_BN, settings, eos_E, stop_texts)

    def _pad(self, prompts: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        longest = max(map(len, prompts))
        missing = [longest - len(prompt) for prompt in prompts]
        ids = [[self.pad_token_id] * m + list(p) for m, p in zip(missing, prompts, strict=True)]
        mask = [[0] * m + [1] * (longest - m) for m in missing]
        device = self.model.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _uniforms(requests: Sequence[SampleRequest], batch: Sequence[Row], max_new_tokens: int) -> Tensor:
    by_request = {
        index: request_uniforms(requests[index].seed, requests[index].num_samples, max_new_tokens)
        for index in dict.fromkeys(index for index, _ in batch)
    }
    return torch.stack([by_request[index][number] for index, number in batch])


def _samples(written: Completions, batch: Sequence[Row]) -> list[Sample]:
    ids = written.ids_BN.tolist()
    lengths = written.lengths_B.tolist()
    finished = written.is_finished_B.tolist()
    logprobs_BN = written.logprobs_BN.cpu()
    samples = []
    for row, length in enumerate(lengths):
        logprobs_L = logprobs_BN[row, :length].clone()
        if not logprobs_L.isfinite().all():
            index, number = batch[row]
            first = int((~logprobs_L.isfinite()).nonzero()[0])
            raise ValueError(
                f"the model's logits are not finite at token {first} of sample {number} of request {index}: "
                "its weights hold NaN or have diverged; lower the learning rate and start from a checkpoint "
                "before that"
            )
        samples.append(Sample(tuple(ids[row][:length]), logprobs_L, finished[row]))
    return samples
