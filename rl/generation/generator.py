"""What a trainer asks of whatever samples its completions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from .settings import SamplingSettings


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """Samples that are wanted of one prompt.

    Attributes:
        prompt_ids: What is continued, forced tokens appended.
        num_samples: How many continuations.
        seed: Of this request's randomness.

    Raises:
        ValueError: No prompt, no sample, or a seed that is not one.
    """

    prompt_ids: tuple[int, ...]
    num_samples: int
    seed: int

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError("the prompt has no tokens: a completion needs at least one to go on from")
        if self.num_samples < 1:
            raise ValueError(f"num_samples={self.num_samples} must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must be between 0 and 2**63 - 1")


@dataclass(frozen=True)
class Sample:
    """One continuation.

    Attributes:
        ids: Its tokens; the end token is the last one if it was written, and with stop strings the token
            that completed one.
        logprobs: ``[L]`` float32, on the CPU: log-softmax(logits / temperature) over the whole vocabulary,
            before top-k, top-p and min-p take tokens away, because this is what the losses compute of
            the policy.
        is_finished: False when it met the length limit before it ended.
    """

    ids: tuple[int, ...]
    logprobs: Float[Tensor, " L"]
    is_finished: bool


@runtime_checkable
class Generator(Protocol):
    """Writes completions."""

    def generate(self, requests: Sequence[SampleRequest], settings: SamplingSettings) -> list[list[Sample]]:
        """Sample what is requested.

        Returns:
            The samples of each request, in the order of the requests.
        """
        ...
