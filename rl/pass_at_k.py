"""The chance that one of k completions is right, estimated from n."""

import numpy as np
from jaxtyping import Float, Int


def pass_at_k(num_samples: int, num_right: Int[np.ndarray, " P"], k: int) -> Float[np.ndarray, " P"]:
    """Unbiased ``1 - C(n - c, k) / C(n, k)`` of each problem.

    Args:
        num_samples: n, completions of each problem.
        num_right: c, how many of them are right.
        k: At most n.

    Raises:
        ValueError: k is not between 1 and n, or c not between 0 and n.

    Reference: Chen et al., Evaluating large language models trained on code, eq. 1, arXiv:2107.03374.
    """
    right = np.asarray(num_right)
    if not 1 <= k <= num_samples:
        raise ValueError(f"k={k} is not between 1 and the {num_samples} completions of each problem")
    if ((right < 0) | (right > num_samples)).any():
        raise ValueError(f"the numbers of right completions must be between 0 and {num_samples}")
    # The product of 1 - k / i for i in (n - c, n]; no factorial that could overflow.
    places = np.arange(1, num_samples + 1)
    factors = np.where(places > num_samples - right[:, None], 1 - k / places, 1.0).clip(min=0)
    return 1 - factors.prod(axis=1)
