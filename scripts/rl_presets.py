"""Values of `moekit rl`'s options that nobody gave: a preset's, the method's own, or the usual ones."""

from typing import Any

from ..rl import Algorithm

TINY = {
    "prompts_per_step": 16,
    "num_generations": 8,
    "micro_batch_size": 64,
    "max_completion_length": 32,
    "learning_rate": 3e-4,
}
"""For models of a few million parameters on a CPU."""
USUAL = {
    "prompts_per_step": 8,
    "num_generations": 8,
    "mini_batches": 1,
    "num_iterations": 1,
    "micro_batch_size": 16,
    "max_completion_length": 256,
    "temperature": 1.0,
    "beta": 0.0,
    "entropy_coef": 0.0,
    "learning_rate": 1e-6,
}


def resolve(algorithm: Algorithm, preset: str, given: dict[str, Any]) -> dict[str, Any]:
    """A value for each option of `USUAL`.

    Args:
        algorithm: The method; what it needs for its mathematics goes before what is usual.
        preset: ``none``, ``tiny`` or ``paper``.
        given: The options as the user left them; ``None`` where nothing was given.
    """
    found = dict(USUAL)
    if algorithm.min_updates > (given["num_iterations"] or 1):
        found["mini_batches"] = algorithm.min_updates
    paper = algorithm.trainer_defaults
    # A loss term is part of the method; sizes and rates are the authors' machines'.
    found |= {name: value for name, value in paper.items() if name in ("entropy_coef", "beta")}
    if preset == "paper":
        found |= {name: value for name, value in paper.items() if name in USUAL}
    if preset == "tiny":
        found |= TINY
    return found | {name: value for name, value in given.items() if name in USUAL and value is not None}
