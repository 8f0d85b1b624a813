"""How much of S is kept at each step of a training: LoSparse's cubic schedule."""


def kept_share(step: int, total: int, final: float | int, *, warm_up: int, cool_down: int) -> float:
    """``P_T + (1 - P_T) (1 - (t - T_i) / (T - T_i - T_f))^3`` between the first T_i and the last T_f steps.

    Args:
        step: t.
        total: T.
        final: P_T, the share at the end, in [0, 1].
        warm_up: T_i, steps in which everything is kept.
        cool_down: T_f, steps at the end in which the share stays.

    Raises:
        ValueError: A share outside [0, 1], or phases that do not fit.

    Reference: LoSparse, arXiv:2306.11222, as in MC-SMoE's code; the form printed in MC-SMoE's paper gives
    shares above 1 and misses the end.
    """
    if not 0 <= final <= 1:
        raise ValueError(f"final={final} is not a share in [0, 1]")
    if warm_up < 0 or cool_down < 0 or warm_up + cool_down >= total:
        raise ValueError(
            f"warm_up={warm_up} and cool_down={cool_down} leave nothing of {total} steps in between"
        )
    if step <= warm_up:
        return 1.0
    if step >= total - cool_down:
        return float(final)
    done = (step - warm_up) / (total - warm_up - cool_down)
    return final + (1 - final) * (1 - done) ** 3
