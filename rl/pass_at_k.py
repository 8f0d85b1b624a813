"""How likely one of k completions is right."""

# P problems

import numpy as np
from jaxtyping import Float, Int


def pass_at_k(
    num_samples: int | Int[np.ndarray, " P"], num_correct: Int[np.ndarray, " P"], k: int
) -> Float[np.ndarray, " P"]:
    """Unbiased estimate for each problem that one of k completions is right: ``1 - C(n - c, k) / C(n, k)``.

    The quotient is the product of ``(n - c - i) / (n - i)`` for i < k, which neither overflows nor cancels.

    Args:
        num_samples: n, completions of each problem, or of all.
        num_correct: c, right ones among them.
        k: At most n.

    Raises:
        ValueError: k is not in 1..n, or c not in 0..n.

    Reference: Chen et al., Evaluating Large Language Models Trained on Code, eq. 1, arXiv:2107.03374.
    """
    n_P = np.broadcast_to(np.asarray(num_samples), num_correct.shape)
    if k < 1 or (n_P < k).any():
        raise ValueError(f"pass@{k} of {int(n_P.min(initial=k))} completions; k must be in 1..completions")
    if (num_correct < 0).any() or (num_correct > n_P).any():
        raise ValueError("there must be between 0 and all completions that are right")
    i_k = np.arange(k)
    n_P1 = n_P[:, None].astype(np.float64)
    return 1.0 - np.prod(np.clip(n_P1 - num_correct[:, None] - i_k, 0, None) / (n_P1 - i_k), axis=1)


def bootstrap_interval(
    values: Float[np.ndarray, " P"], *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean over problems, which are resampled.

    It covers the choice of problems, and of completions as far as they differ between problems. With few
    problems (under about 20) it is too narrow.

    Args:
        values: One for each problem, pass@k say.
        confidence: Probability of the interval, in (0, 1).
        resamples: Bootstrap samples.
        seed: Of the resampling.

    Raises:
        ValueError: There is no value, or one is not finite.
    """
    if not len(values) or not np.isfinite(values).all():
        raise ValueError("an interval needs at least one value, and finite ones")
    drawn = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(values[drawn].mean(1), [tail, 1 - tail])
    return float(low), float(high)
