"""How much a token's log-prob varies with its advantage (Clip-Cov and KL-Cov)."""

# N valid tokens of a mini-batch

import math

from jaxtyping import Float
from torch import Tensor

from .algorithm import SelectionInputs


def token_covariances(tokens: SelectionInputs) -> Float[Tensor, " N"]:
    """``(log pi_theta - its mean) (A - its mean)``; their mean is what lowers the entropy.

    Reference: Cui et al., The Entropy Mechanism of RL for Reasoning Language Models, section 4,
        arXiv:2505.22617.
    """
    return (tokens.logprobs - tokens.logprobs.mean()) * (tokens.advantages - tokens.advantages.mean())


def quota(share: float, num_tokens: int) -> int:
    """``max(1, floor(share N))``, and no more than N.

    Raises:
        ValueError: The share is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share} of tokens to select must be above 0 and at most 1")
    # Products such as 0.29 x 100 fall short of the whole number that they mean.
    return min(num_tokens, max(1, math.floor(share * num_tokens + 1e-9)))
