"""Every method learns a task that is trivial: to write certain letters."""

import pytest
from moekit.rl import ALGORITHMS

from .tiny_rl import LIKED, rewards_of, tiny_prompts, tiny_trainer

SETTINGS = {"num_generations": 8, "prompts_per_step": 8, "micro_batch_size": 64, "save_steps": 99}
EASY_BUDGETS = {"budgets": (0.34, 1.0), "budget_prefix": "{budget}"}
"""Completions beyond a budget push all down, which a policy of this size does not survive."""


def rewards_before_and_after(folder, name, steps, **settings):
    trainer = tiny_trainer(
        folder,
        name,
        eval_prompts=tiny_prompts(8),
        eval_generations=16,
        steps=steps,
        **{**SETTINGS, **settings},
    )
    trainer.train()
    rows = [row for row in trainer.history.read() if "eval_reward" in row]
    return rows[0]["eval_reward"], rows[-1]["eval_reward"]


def has_liked(completion_ids, **_):
    """Right or wrong, as HBPO wants it, which then looks at the length."""
    return [float(any(i in LIKED for i in ids)) for ids in completion_ids]


def test_grpo_learns(tmp_path):
    before, after = rewards_before_and_after(tmp_path, "grpo", 12, learning_rate=2e-2)
    assert before < 0.3
    assert after > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_method_learns(tmp_path, name):
    given = {"rewards": rewards_of(has_liked), "method": EASY_BUDGETS} if name == "hbpo" else {}
    before, after = rewards_before_and_after(tmp_path, name, 20, learning_rate=2e-2, **given)
    assert after > before + 0.2
