"""What a model generates: completions, the share that ends in a loop, and answers to questions.

Dimensions: B prompts of a batch, S positions.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..moe.data import Document
from ..moe.evaluating import evaluating

# Tokens allowed beyond the longest answer, so that an answer that goes on is seen to do so.
ANSWER_MARGIN = 4


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt that ends in the answer marker, and the answer's first line."""

    prompt: str
    answer: str
    domain: str


def ends_in_loop(
    token_ids: Sequence[int], *, max_period: int = 16, min_repeats: int = 3, min_tokens: int = 24
) -> bool:
    """Tell whether a completion ends in a loop: the same few tokens over and over, to its last token.

    It does when, for some period p up to `max_period`, its last tokens each equal the token p places before,
    over a stretch of at least `min_repeats` periods and `min_tokens` tokens. A completion that closes
    with an end-of-sequence token found its way out and is no loop.

    Greedy decoding falls into such attractors because each repetition makes the next more likely, and damaged
    models do so earlier; neither perplexity nor KL on given text can see it.

    Args:
        token_ids: The generated tokens, without prompt and padding.
        max_period: Longest repeated piece, tokens.
        min_repeats: Fewest repetitions.
        min_tokens: Fewest tokens that they cover.

    Reference:
        Xu et al., "Learning to Break the Loop" (NeurIPS 2022), arXiv:2206.02369: the self-reinforcement of
        repetitions under greedy decoding. The thresholds are ours.
    """
    for period in range(1, min(max_period, len(token_ids) - 1) + 1):
        position = len(token_ids) - 1
        while position >= period and token_ids[position] == token_ids[position - period]:
            position -= 1
        covered = len(token_ids) - 1 - position + period
        if covered >= max(min_repeats * period, min_tokens):
            return True
    return False


def loop_share(completions: Sequence[Sequence[int]]) -> float:
    """Share of completions that end in a loop (`ends_in_loop`), in [0, 1].

    Raises:
        ValueError: No completions.
    """
    if len(completions) == 0:
        raise ValueError("there are no completions to look for loops in")
    return sum(ends_in_loop(token_ids) for token_ids in completions) / len(completions)


def greedy_config(model: PreTrainedModel, *, max_new_tokens: int) -> GenerationConfig:
    """Plain greedy decoding: the model's special tokens, but none of its sampling and penalty settings.

    `generate` fills what is None from the model's own settings, so the neutral values are spelled out.
    """
    own: Any = model.generation_config
    eos = own.eos_token_id[0] if isinstance(own.eos_token_id, list) else own.eos_token_id
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=max_new_tokens,
        pad_token_id=eos if own.pad_token_id is None else own.pad_token_id,
    )


def generate_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    progress: bool = False,
) -> list[list[int]]:
    """Complete each prompt greedily.

    Prompts are batched by length, shortest first, and padded on the left; the completions come in the order
    of the prompts.

    Args:
        model: A model that generates.
        tokenizer: Its tokenizer.
        prompts: Texts to go on from.
        max_new_tokens: Most tokens of a completion.
        batch_size: Prompts at a time.
        progress: Show a progress bar.

    Returns:
        The new tokens of each prompt, without padding. An end-of-sequence token that was generated is the
        last one, so a completion whose last token is something else was cut off.

    Raises:
        ValueError: No prompts, a prompt without tokens, or one too long for the model.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} and batch_size={batch_size} must be positive")
    prompt_ids = _prompt_ids(model, tokenizer, prompts, max_new_tokens)
    config = greedy_config(model, max_new_tokens=max_new_tokens)
    own: Any = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = set(own if isinstance(own, list) else [own])
    order = sorted(range(len(prompts)), key=lambda i: len(prompt_ids[i]))
    starts = range(0, len(order), batch_size)
    completions: dict[int, list[int]] = {}
    with evaluating(model):
        for start in tqdm(starts, "Generating", disable=not progress, unit="batch"):
            members = order[start : start + batch_size]
            generated = _generate(model, [prompt_ids[i] for i in members], config)
            completions.update(zip(members, (_until_end(ids, ends) for ids in generated), strict=True))
    return [completions[i] for i in range(len(prompts))]


def _prompt_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int
) -> list[list[int]]:
    if len(prompts) == 0:
        raise ValueError("there are no prompts to complete")
    prompt_ids: list[Any] = list(tokenizer(list(prompts), verbose=False).input_ids)
    if empty := [i for i, ids in enumerate(prompt_ids) if len(ids) == 0]:
        raise ValueError(f"prompt {empty[0]} has no tokens: a completion needs at least one to go on from")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, prompt_ids))
    if context is not None and longest + max_new_tokens > context:
        raise ValueError(
            f"the longest prompt has {longest} tokens; with max_new_tokens={max_new_tokens} it does not fit "
            f"the model's context of {context}"
        )
    return prompt_ids


def _generate(model: Any, prompt_ids: list[list[int]], config: GenerationConfig) -> list[list[int]]:
    longest = max(map(len, prompt_ids))
    pad = 0 if config.pad_token_id is None else config.pad_token_id
    ids_BS = torch.full((len(prompt_ids), longest), pad, dtype=torch.long)
    mask_BS = torch.zeros_like(ids_BS)
    for row, ids in enumerate(prompt_ids):
        ids_BS[row, longest - len(ids) :] = torch.tensor(ids)
        mask_BS[row, longest - len(ids) :] = 1
    output_BS = model.generate(
        input_ids=ids_BS.to(model.device), attention_mask=mask_BS.to(model.device), generation_config=config
    )
    # An encoder-decoder's output holds no prompt, only the token that starts the decoder.
    num_given = 1 if model.config.is_encoder_decoder else longest
    return output_BS[:, num_given:].tolist()


def _until_end(ids: list[int], ends: set[int | None]) -> list[int]:
    for position, token in enumerate(ids):
        if token in ends:
            return ids[: position + 1]
    return ids


def split_questions(documents: Iterable[Document], answer_marker: str = "\nA:") -> list[Question]:
    """Cut question-answer documents at the last `answer_marker`; those without it or an answer are left out.

    The prompt ends with the marker, without spaces after it (these belong to the answer's first token);
    earlier questions and answers of the same document stay in the prompt as examples.

    Raises:
        ValueError: The marker is blank.
    """
    if not answer_marker.strip():
        raise ValueError(f"answer_marker={answer_marker!r} is blank")
    marker = answer_marker.rstrip(" ")
    questions = []
    for document in documents:
        before, found, rest = document.text.rpartition(marker)
        if found and rest.strip():
            questions.append(Question(before + found, _first_line(rest), document.domain))
    return questions


def task_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[Document],
    *,
    answer_marker: str = "\nA:",
    batch_size: int = 32,
    progress: bool = False,
) -> list[bool]:
    """Tell for each question whether the first line that the model generates is the answer, letter by letter.

    Questions are what `split_questions` finds in the documents, in that order. The mean of the result is the
    accuracy; `fidelity.confidence_interval` gives its interval.

    Raises:
        ValueError: No document holds the marker and an answer, or a question is too long for the model.
    """
    questions = split_questions(documents, answer_marker)
    if not questions:
        raise ValueError(f"no document holds the answer marker {answer_marker!r} and an answer after it")
    answers: list[Any] = list(tokenizer([q.answer for q in questions], add_special_tokens=False).input_ids)
    completions = generate_completions(
        model,
        tokenizer,
        [question.prompt for question in questions],
        max_new_tokens=max(map(len, answers)) + ANSWER_MARGIN,
        batch_size=batch_size,
        progress=progress,
    )
    texts = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in completions]
    return [_first_line(text) == question.answer for text, question in zip(texts, questions, strict=True)]


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0].strip()
