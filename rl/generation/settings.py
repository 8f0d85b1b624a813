"""How completions are sampled: length, temperature, truncation, stop strings."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How completions are sampled.

    Attributes:
        max_new_tokens: Most tokens of a completion, the end token included.
        temperature: Logits are divided by it.
        top_p: Keep the most probable tokens whose probabilities first sum to this; 1 keeps all.
        top_k: Keep that many most probable tokens; 0 keeps all.
        min_p: Keep tokens at least this fraction as probable as the most probable one; 0 keeps all.
        stop: A completion ends with the token that completes one of these texts.
        greedy: Take the most probable token instead of drawing; `temperature` then only scales log-probs.

    Raises:
        ValueError: A value outside its range.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    greedy: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(
                f"temperature={self.temperature} must be a finite number above 0; "
                "for the most probable token set greedy=True"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1 (1 keeps every token)")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be 0 (every token) or positive")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must be between 0 (every token) and 1")
        if "" in self.stop:
            raise ValueError("stop holds an empty text, which every completion contains; leave it out")

    @property
    def truncates(self) -> bool:
        """Whether some tokens cannot be drawn."""
        return not self.greedy and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)
