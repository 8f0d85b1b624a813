"""When a completion has said one of the texts that end it."""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase

# Tokens decoded beyond the longest text: the first ones may decode differently without their neighbours.
EXTRA_TOKENS = 8


class StopTexts:
    """Looks for stop texts at the end of completions.

    Only a tail is decoded, as long as the longest text can be: each token that matters holds at least one of
    its bytes. Special tokens are decoded too, so their text can stop.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.texts = tuple(texts)
        self.tail_length = max(len(text.encode()) for text in texts) + EXTRA_TOKENS

    def are_in(self, tails: Tensor) -> list[bool]:
        """Whether a text is in each row of tokens ``[R, <= tail_length]``."""
        decoded = self.tokenizer.batch_decode(
            tails.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return [any(text in tail for text in self.texts) for tail in decoded]
