"""Evaluations on held-out prompts."""

import pytest
import torch
from moekit.rl import Prompt, Rollout, RolloutGroup, Sample
from moekit.rl.evaluation import is_right

from .tiny_rl import (
    END,
    ENDS,
    LIKED,
    PAD,
    double_policy,
    liked,
    rewards_of,
    tiny_policy,
    tiny_prompts,
    tiny_trainer,
)


def evaluated(folder, **given):
    return tiny_trainer(folder, eval_prompts=tiny_prompts(4), **{"pass_at": 0.3, **given})


def test_every_evaluation_draws_the_same(tmp_path):
    trainer = evaluated(tmp_path, eval_steps=1)
    first = trainer._evaluation()
    assert trainer._evaluation() == first
    trainer.state.step, trainer.state.updates = 7, 9
    assert trainer._evaluation() == first
    assert evaluated(tmp_path, seed=1)._evaluation() != first


def test_an_evaluation_does_not_depend_on_the_training_settings(tmp_path):
    first = evaluated(tmp_path)._evaluation()
    assert evaluated(tmp_path, num_generations=2, mini_batches=2, steps=9)._evaluation() == first


def test_the_method_shapes_no_evaluation(tmp_path):
    plain = evaluated(tmp_path)._evaluation()
    for name in ("hbpo", "rl-plus"):
        trainer = tiny_trainer(tmp_path, name, eval_prompts=tiny_prompts(4), pass_at=0.3)
        assert trainer._evaluation() == plain


def test_pass_at_k_rises_with_k_and_begins_with_the_share_of_right_ones(tmp_path):
    judged = []

    def noted(completion_ids, **_):
        judged.extend(liked(completion_ids))
        return liked(completion_ids)

    found = evaluated(tmp_path, rewards=rewards_of(noted))._evaluation()
    values = [found[f"eval_pass@{k}"] for k in (1, 2, 4, 8)]
    assert values == sorted(values)
    assert values[0] < values[-1]
    assert "eval_pass@16" not in found
    assert len(judged) == 32
    assert values[0] == pytest.approx(sum(value >= 0.3 for value in judged) / 32)
    assert found["eval_reward"] == pytest.approx(sum(judged) / 32)
    groups = [judged[i : i + 8] for i in range(0, 32, 8)]
    assert values[-1] == pytest.approx(sum(max(group) >= 0.3 for group in groups) / 4)


def test_a_number_of_completions_that_is_no_power_of_two(tmp_path):
    found = evaluated(tmp_path, eval_generations=6)._evaluation()
    assert [name for name in found if "pass" in name] == ["eval_pass@1", "eval_pass@2", "eval_pass@4"]


def test_greedy_evaluation_takes_the_likeliest_token(tmp_path):
    prompts, said = tiny_prompts(4), []

    def noted(prompts, completion_ids, **_):
        said.extend(zip(prompts, completion_ids, strict=True))
        return liked(completion_ids)

    found = evaluated(tmp_path, eval_temperature=0.0, rewards=rewards_of(noted))._evaluation()
    assert "eval_pass@2" not in found
    assert len(said) == 4
    model = tiny_policy()
    for prompt, (text, ids) in zip(prompts, said, strict=True):
        assert text == prompt.given
        expected = model.generate(
            torch.tensor([prompt.ids]),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=list(ENDS),
            pad_token_id=PAD,
        )
        assert ids == expected[0, len(prompt.ids) :].tolist()


@pytest.mark.parametrize(("eval_steps", "expected"), [(0, [0, 5]), (2, [0, 2, 4, 5]), (5, [0, 5])])
def test_when_it_is_evaluated(tmp_path, eval_steps, expected):
    trainer = evaluated(tmp_path, steps=5, eval_steps=eval_steps, eval_generations=1, save_steps=9)
    trainer.train()
    assert [row["step"] for row in trainer.history.read() if "eval_reward" in row] == expected


def test_without_held_out_prompts_nothing_is_evaluated(tmp_path):
    trainer = tiny_trainer(tmp_path, eval_steps=1, steps=2)
    trainer.train()
    assert not any(name.startswith("eval_") for row in trainer.history.read() for name in row)


def test_distinct_completions_are_counted_as_texts(tmp_path):
    trainer = evaluated(tmp_path, rewards=rewards_of(lambda completions, **_: [1.0 for _ in completions]))
    trainer.rollouts.collector.generator = Repeating()
    found = trainer._evaluation()
    assert found["eval_distinct"] == 2 / 8
    assert found["eval_distinct_correct"] == 2
    assert found["eval_length"] == 1.5
    assert found["eval_truncated"] == 0.5


class Repeating:
    """Two texts in turn, the first ended."""

    def generate(self, requests, settings):
        word = min(LIKED)
        samples = [Sample((word, END), torch.zeros(2), True), Sample((word + 1,), torch.zeros(1), False)]
        return [[samples[number % 2] for number in range(r.num_samples)] for r in requests]


def test_unknown_rewards_are_not_right():
    prompt = Prompt(index=0, text="a", ids=(3,), given="a")
    rollout = Rollout(completion_ids=(3,), text="a", is_truncated=False)
    rewards = torch.tensor([1.0, torch.nan, 0.0])
    group = RolloutGroup(prompt=prompt, rollouts=(rollout,) * 3, rewards=rewards)
    assert is_right(group, 0.5) == [True, False, False]
    named = RolloutGroup(
        prompt=prompt,
        rollouts=(rollout,) * 3,
        rewards=rewards,
        rewards_by_function={"first": torch.tensor([0.0, 0.5, torch.nan]), "second": rewards},
    )
    assert is_right(named, 0.5) == [False, True, False], "the first function decides"


def test_evaluation_and_training_leave_the_random_state_alone(tmp_path):
    trainer = evaluated(tmp_path, model=double_policy())
    torch.manual_seed(5)
    before = torch.get_rng_state()
    trainer._evaluation()
    trainer._step()
    assert torch.get_rng_state().equal(before)
