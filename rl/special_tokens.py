"""Tokens that end completions, and one that fills up."""

from typing import Any

from transformers import PreTrainedModel


def end_and_pad(model: PreTrainedModel, tokenizer: Any) -> tuple[tuple[int, ...], int]:
    """The end tokens of a policy, and its padding token (an end token where it has none).

    Raises:
        ValueError: The tokenizer has no end token, so no completion could ever end.
    """
    config: Any = getattr(model, "generation_config", None)
    given = getattr(config, "eos_token_id", None)
    ends = list(given) if isinstance(given, list | tuple) else [] if given is None else [given]
    if tokenizer.eos_token_id is not None:
        ends.insert(0, tokenizer.eos_token_id)
    ends = list(dict.fromkeys(int(end) for end in ends))
    if not ends:
        raise ValueError(
            "neither the tokenizer nor the model's generation config has an end token (eos_token), so completions "
            "could only run into the length limit; set tokenizer.eos_token"
        )
    pad = tokenizer.pad_token_id
    return tuple(ends), int(ends[0] if pad is None else pad)
