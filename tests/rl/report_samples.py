"""A made-up history for the tests of the report: rising reward, falling entropy, evaluations between."""

import math
import random

from moekit.rl.entropy_law import EntropyLaw

LAW = EntropyLaw(a=0.2, b=0.9, r_squared=1.0, num_points=0)


def made_up_history(steps: int = 200, seed: int = 0) -> list[dict]:
    """Rows as the trainer writes them."""
    rng = random.Random(seed)
    rows = []
    for step in range(steps + 1):
        done = 1 - math.exp(-3 * step / max(1, steps))
        entropy = 1.1 - done
        row = {"step": step}
        if step:
            row |= {
                "reward": 0.2 + 0.5 * done + rng.gauss(0, 0.06),
                "rewards/exact-match/mean": 0.1 + 0.5 * done + rng.gauss(0, 0.05),
                "rewards/format/mean": 0.1 + rng.gauss(0, 0.02),
                "entropy": entropy,
                "entropy_covariance": 0.02 * math.exp(-done * 3) + rng.gauss(0, 0.003),
                "kl": 0.05 * done + abs(rng.gauss(0, 0.003)),
                "kl_to_old": abs(rng.gauss(0, 0.001)),
                "completions/distinct": 1 - 0.7 * done,
                "completions/mean_length": 60 - 20 * done + rng.gauss(0, 2),
                "completions/mean_terminated_length": 50 - 15 * done + rng.gauss(0, 2),
                "completions/clipped_ratio": 0.3 - 0.25 * done,
                "frac_reward_zero_std": 0.2 + 0.5 * done,
                "clip_ratio/low": abs(rng.gauss(0.002, 0.001)),
                "clip_ratio/high": abs(rng.gauss(0.004, 0.001)),
                "grad_norm": 0.5 + abs(rng.gauss(0, 0.2)),
                "router_entropy": 1.9 - 0.2 * done,
                "expert_load_max": 1.5 + done,
                "expert_dead_share": 0.0,
            }
        if step % max(1, steps // 10) == 0:
            one = LAW.predict(1.1 - done)
            row |= {f"eval_pass@{k}": 1 - (1 - one) ** (1 + 0.5 * (1 - done) * (k - 1)) for k in (1, 2, 4, 8)}
            row |= {"eval_reward": one, "eval_distinct": 1 - 0.6 * done, "eval_distinct_correct": 1 + done}
            row |= {"eval_length": 55.0, "eval_truncated": 0.1}
        rows.append(row)
    return rows


def made_up_completions(count: int = 30) -> list[dict]:
    """Rows as the trainer keeps them."""
    return [
        {
            "step": step,
            "prompt": f"What is {step} + {step}?",
            "completion": f"<think>double of {step}</think>\n<answer>{2 * step}</answer>",
            "reward": float(step % 3 > 0),
        }
        for step in range(count)
    ]


FACTS = {
    "policy": "made up for a test",
    "method": "GRPO (2402.03300)",
    "seed": "0",
    "a step": "8 prompts x 8",
}
