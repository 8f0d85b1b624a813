"""Tokens that end completions, and one that fills up."""

from typing import Any


def end_and_pad(model: Any, tokenizer: Any) -> tuple[tuple[int, ...], int]:
    """The end tokens of a policy, and its padding token (an end token where it has none).

    Args:
        model: The policy; only tokens of its vocabulary count.
        tokenizer: Its tokenizer.

    Raises:
        ValueError: There is no end token that the policy could write, so no completion would ever end.
    """
    size = model.config.get_text_config().vocab_size
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    more = given if isinstance(given, list | tuple) else [given]
    ends = dict.fromkeys(int(end) for end in (tokenizer.eos_token_id, *more) if end is not None)
    ends = tuple(end for end in ends if 0 <= end < size)
    if not ends:
        raise ValueError(
            "neither the tokenizer nor the model's generation config has an end token (eos_token) in the "
            f"model's vocabulary of {size}, so completions could only run into the length limit; set "
            "tokenizer.eos_token"
        )
    pad = tokenizer.pad_token_id
    return ends, ends[0] if pad is None or not 0 <= pad < size else int(pad)
