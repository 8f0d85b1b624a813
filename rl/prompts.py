"""Rows of data as prompts, and the order in which they are taken."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .rollout import Prompt
from .seeds import seed_of

RESERVED = ("prompt", "completion", "completion_ids")


def make_prompts(
    rows: Sequence[Mapping[str, Any]], tokenizer: Any, *, max_length: int | None = None, **template: Any
) -> list[Prompt]:
    """Tokenize rows; chats go through the tokenizer's template, which adds the head of the answer.

    Args:
        rows: Each with a ``prompt``: a string, or a list of messages with ``role`` and ``content``.
        tokenizer: The policy's.
        max_length: Most tokens; a longer prompt is refused, since cutting it would change the task.
        template: Passed to the chat template.

    Raises:
        ValueError: A row has no such prompt, an empty one, or one that is too long; there is no row.
    """
    if not rows:
        raise ValueError("there are no prompts: the data have no rows")
    return [_prompt(index, row, tokenizer, max_length, template) for index, row in enumerate(rows)]


def _prompt(
    index: int, row: Mapping[str, Any], tokenizer: Any, max_length: int | None, template: dict[str, Any]
) -> Prompt:
    given = row.get("prompt")
    if given is None:
        found = ", ".join(map(str, row)) or "none"
        raise ValueError(
            f"row {index + 1} has no 'prompt'; its columns: {found}. Rename the column that is to be "
            "continued"
        )
    text = given if isinstance(given, str) else _chat(index, given, tokenizer, template)
    ids = tokenizer(text, add_special_tokens=isinstance(given, str))["input_ids"]
    if not text or not ids:  # a tokenizer may make a token of nothing
        raise ValueError(f"the prompt of row {index + 1} is empty")
    if max_length is not None and len(ids) > max_length:
        raise ValueError(
            f"the prompt of row {index + 1} has {len(ids)} tokens, and at most {max_length} are allowed; "
            "leave it out, or allow longer ones"
        )
    columns = {key: value for key, value in row.items() if key not in RESERVED}
    return Prompt(index=index, text=text, ids=tuple(ids), given=given, columns=columns)


def _chat(index: int, messages: Any, tokenizer: Any, template: dict[str, Any]) -> str:
    is_chat = isinstance(messages, list) and all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )
    if not is_chat or not messages:
        raise ValueError(
            f"the prompt of row {index + 1} is neither a string nor a list of messages with role and "
            f"content: {messages!r:.80}"
        )
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"the prompt of row {index + 1} is a list of messages, and the tokenizer has no chat template; "
            "give strings, or a tokenizer with one"
        )
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **template)


def check_context(prompts: Sequence[Prompt], context: int | None, max_completion_length: int) -> None:
    """Refuse prompts that leave too little of a model's context.

    Args:
        prompts: All of a run.
        context: Most tokens that the model reads; ``None`` if it sets no limit.
        max_completion_length: Tokens.

    Raises:
        ValueError: The longest prompt and completion do not fit.
    """
    longest = max(len(prompt.ids) for prompt in prompts)
    if context is not None and longest + max_completion_length > context:
        raise ValueError(
            f"the longest prompt ({longest} tokens) and max_completion_length={max_completion_length} do not "
            f"fit the policy's context of {context} tokens; take shorter ones"
        )


def draw_order(num_items: int, start: int, count: int, seed: int) -> list[int]:
    """Numbers of items ``start .. start + count`` of an endless stream that shuffles anew in each epoch.

    Stateless: what a position holds depends on the seed alone, so a resumed run draws what it would have
    drawn.
    """
    found: list[int] = []
    while len(found) < count:
        epoch, offset = divmod(start + len(found), num_items)
        generator = torch.Generator().manual_seed(seed_of(seed, "order", epoch))
        order = torch.randperm(num_items, generator=generator)
        found += order[offset : offset + count - len(found)].tolist()
    return found
