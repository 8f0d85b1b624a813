"""Measure a compressed model against the original: on held-out text, in what it generates, and in speed."""

import logging
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..compress.fidelity import FidelityReport, compare_models, confidence_interval
from ..compress.generation import ends_in_loop, generate_completions, split_questions, task_accuracy
from ..compress.report_content import Comparison
from ..compress.throughput import compare_throughput
from ..moe.data import Document, TokenBlocks
from .calibrate import context_length

logger = logging.getLogger(__name__)

MAX_PROMPTS = 48
PROMPT_TOKENS = 16
NEW_TOKENS = 64
MAX_QUESTIONS = 200


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """Everything that was measured."""

    fidelity: FidelityReport
    generation: tuple[Comparison, ...]
    throughput: tuple[Comparison, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "fidelity": self.fidelity.to_dict(),
            "generation": [asdict(row) for row in self.generation],
            "throughput": [asdict(row) for row in self.throughput],
        }


def measure(
    original: PreTrainedModel,
    compressed: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: TokenBlocks,
    *,
    batch_size: int,
    answer_marker: str,
    progress: bool,
) -> Measurements:
    """Compare two models on held-out blocks.

    Args:
        original: The reference.
        compressed: The model to judge.
        tokenizer: Of both.
        blocks: Held-out text.
        batch_size: Blocks at a time.
        answer_marker: What stands before the answer in question-answer documents.
        progress: Show progress bars.
    """
    fidelity = compare_models(original, compressed, blocks, batch_size, progress=progress)
    models = (original, compressed)
    rows = [
        _loops(models, tokenizer, blocks, progress),
        _answers(models, tokenizer, blocks, answer_marker, progress),
    ]
    prefill, decode = compare_throughput(original, compressed, blocks, batch_size=batch_size)
    speeds = (("Reading (prefill)", prefill), ("Writing (decode)", decode))
    throughput = tuple(
        Comparison(name=name, before=speed.original, after=speed.compressed, unit="tokens/s")
        for name, speed in speeds
    )
    generation = tuple(row for row in rows if row is not None)
    return Measurements(fidelity=fidelity, generation=generation, throughput=throughput)


def held_out_documents(
    blocks: TokenBlocks, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> list[Document]:
    """Documents that lie whole within a block: what stands between two ends of a document."""
    end: Any = tokenizer.eos_token_id
    documents = []
    for ids_S, mask_S, domain in zip(blocks.input_ids, blocks.attention_mask, blocks.domains, strict=True):
        ids = ids_S[mask_S.bool()].tolist()
        ends = [position for position, token in enumerate(ids) if token == end]
        for first, last in pairwise(ends):
            if 1 < last - first <= max_tokens:
                text = tokenizer.decode(ids[first + 1 : last], skip_special_tokens=True)
                documents.append(Document(str(text), domain))
    return documents


def _loops(
    models: tuple[PreTrainedModel, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    blocks: TokenBlocks,
    progress: bool,
) -> Comparison | None:
    """Share of greedy completions that end in a loop."""
    context = context_length(models[0].config)
    if context is not None and context < 2 * PROMPT_TOKENS + NEW_TOKENS:
        logger.warning("the model's context of %d tokens is too short to look for loops in", context)
        return None
    full = [ids for ids, mask in zip(blocks.input_ids, blocks.attention_mask, strict=True) if mask.all()]
    starts = [ids[:PROMPT_TOKENS].tolist() for ids in full[:MAX_PROMPTS]]
    prompts = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in starts]
    prompts = [prompt for prompt in prompts if prompt.strip()]
    if not prompts:
        return None
    estimates = []
    for model in models:
        completions = generate_completions(
            model, tokenizer, prompts, max_new_tokens=NEW_TOKENS, progress=progress
        )
        estimates.append(_share([ends_in_loop(ids) for ids in completions]))
    name = "Completions that end in a loop"
    return _comparison(name, estimates, len(prompts), higher_is_better=False)


def _answers(
    models: tuple[PreTrainedModel, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    blocks: TokenBlocks,
    answer_marker: str,
    progress: bool,
) -> Comparison | None:
    """Share of held-out questions that are answered letter by letter."""
    # Half the context each for question and answer, so that any two of them fit together.
    longest = min(blocks.seq_len, (context_length(models[0].config) or 2 * blocks.seq_len) // 2 - 8)
    documents = held_out_documents(blocks, tokenizer, longest)
    documents = [document for document in documents if split_questions([document], answer_marker)]
    if not documents:
        return None
    documents = documents[:MAX_QUESTIONS]
    estimates = [
        _share(task_accuracy(model, tokenizer, documents, answer_marker=answer_marker, progress=progress))
        for model in models
    ]
    return _comparison("Questions answered correctly", estimates, len(documents), higher_is_better=True)


def _share(flags: list[bool]):
    return confidence_interval(np.array(flags, dtype=np.float64), np.ones(len(flags)))


def _comparison(name: str, estimates: list[Any], count: int, *, higher_is_better: bool) -> Comparison:
    intervals = [None if e.low is None or e.high is None else (e.low, e.high) for e in estimates]
    return Comparison(
        name=name,
        before=estimates[0].value,
        after=estimates[1].value,
        before_interval=intervals[0],
        after_interval=intervals[1],
        count=count,
        higher_is_better=higher_is_better,
    )
