"""What a step of the trainer does with rewards and with the length limit."""

import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from moekit.rl import ALGORITHMS, EmbeddedGenerator, NamedReward, RewardSet

from .tiny_rl import (
    ENDS,
    LIKED,
    PAD,
    assert_same,
    liked,
    optimizer_state,
    rewards_of,
    tiny_policy,
    tiny_prompts,
    tiny_tokenizer,
    tiny_trainer,
    weights,
)

REWARDS_ALONE = ("reinforce", "rloo", "grpo", "dr-grpo", "dapo", "gspo", "clip-cov", "kl-cov", "rover")
"""Methods that learn from nothing but differences of rewards."""


def of_prompt(values):
    """A reward that depends on the number of the prompt and of its completion; in the order of the batch."""

    def reward(prompts, completion_ids, **_):
        seen = {}
        found = []
        for prompt in prompts:
            number = seen[prompt] = seen.get(prompt, -1) + 1
            found.append(values(prompt, number))
        return found

    return rewards_of(reward)


@pytest.mark.parametrize("name", REWARDS_ALONE)
@pytest.mark.parametrize("value", [0.1, None, math.nan])
def test_equal_and_unknown_rewards_teach_nothing(tmp_path, name, value):
    rewards = rewards_of(lambda completions, **_: [value for _ in completions])
    trainer = tiny_trainer(tmp_path, name, rewards=rewards, steps=2, weight_decay=0.1, max_sampling_rounds=2)
    before = weights(trainer)
    state = trainer.train()
    assert (state.step, state.updates, state.skipped) == (2, 0, 2)
    assert_same(weights(trainer), before)
    assert optimizer_state(trainer) == {}
    for row in trainer.history.read():
        assert None not in row.values()
        assert row["skipped_steps"] == row["step"]
        assert row.get("reward") == (pytest.approx(0.1) if value == 0.1 else None)
    failed = 2 * 16 * (2 if name == "dapo" else 1) if value is not None and math.isnan(value) else 0
    assert sum(state.failures.values()) == failed


@pytest.mark.parametrize("name", ALGORITHMS)
def test_one_informative_group_is_enough(tmp_path, name):
    chosen = tiny_prompts()[0].given

    def reward(prompt, number):
        return float(number % 2) if prompt == chosen else (None if number else 1.0)

    data = {"rewards": of_prompt(reward), "prompts": tiny_prompts(4)}
    trainer = tiny_trainer(tmp_path, name, **data, steps=1, max_sampling_rounds=1, pass_at=2.0)
    before = weights(trainer)
    assert trainer.train().updates > 0
    after = weights(trainer)
    assert all(value.isfinite().all() for value in after.values())
    assert any((after[n] != before[n]).any() for n in after)
    assert trainer.history.read()[0]["frac_reward_zero_std"] < 1


@pytest.mark.parametrize("masks", [False, True])
def test_truncated_completions_are_masked_if_that_is_wanted(tmp_path, masks):
    trainer = tiny_trainer(tmp_path, mask_truncated_completions=masks)
    rollouts = trainer.rollouts.sample(trainer.state)
    batch = trainer.rollouts.batch(rollouts, trainer.state)
    cut = batch.is_truncated
    assert 0 < cut.sum() < len(cut)
    assert (batch.lengths[cut] == 6).all()
    assert batch.policy_mask[~cut].equal(batch.token_mask[~cut])
    assert batch.policy_mask[cut].any() != masks


@pytest.mark.parametrize("name", ["grpo", "gtpo", "epo"])
def test_a_step_of_truncated_completions_alone_is_skipped(tmp_path, name):
    settings = {"mask_truncated_completions": True, "max_completion_length": 1, "steps": 1}
    model = tiny_policy()
    model.generation_config.eos_token_id = None
    with torch.no_grad():  # the end token is never written
        model.model.embed_tokens.weight[0] = 0.0
        model.model.norm.weight.mul_(100)
    trainer = tiny_trainer(tmp_path, name, model=model, **settings)
    state = trainer.train()
    assert trainer.history.read()[0]["completions/clipped_ratio"] == 1
    assert (state.updates, state.skipped, state.method) == (0, 1, {})


def coarse(completion_ids, **_):
    return [float(ids[0] in LIKED) for ids in completion_ids]


def test_dynamic_sampling_goes_on_until_enough_groups_are_informative(tmp_path):
    trainer = tiny_trainer(tmp_path, "dapo", rewards=rewards_of(coarse), num_generations=2)
    rollouts = trainer.rollouts.sample(trainer.state)
    assert rollouts.num_rounds > 1
    assert trainer.state.position == 4 * rollouts.num_rounds
    assert rollouts.numbers == [0, 1, 2, 3]
    assert all(group.is_informative for group in rollouts.groups)


def test_dynamic_sampling_ends_and_fills_up(tmp_path):
    calls = []

    def rare(completion_ids, **_):
        """Only the second call sees a difference, in its last group."""
        calls.append(len(completion_ids))
        return [float(len(calls) == 2 and number == 7) for number in range(len(completion_ids))]

    trainer = tiny_trainer(
        tmp_path, "dapo", rewards=rewards_of(rare), num_generations=2, max_sampling_rounds=3, steps=1
    )
    state = trainer.train()
    assert calls == [8, 8, 8]
    assert state.position == 12
    assert state.updates == 1
    row = trainer.history.read()[0]
    assert row["sampling/rounds"] == 3
    assert row["frac_reward_zero_std"] == 0.75, "one that teaches, and the first three"


def test_methods_without_dynamic_sampling_sample_once(tmp_path):
    trainer = tiny_trainer(tmp_path, "grpo", rewards=rewards_of(coarse), num_generations=2, steps=1)
    assert trainer.train().position == 4
    assert "sampling/rounds" not in trainer.history.read()[0]


def test_what_reward_functions_tell_is_in_the_row(tmp_path):
    def talkative(completion_ids, log_metric, **_):
        log_metric("longest", max(map(len, completion_ids)))
        return liked(completion_ids)

    trainer = tiny_trainer(tmp_path, rewards=rewards_of(talkative), steps=1, eval_prompts=tiny_prompts(2))
    trainer.train()
    assert trainer.history.read()[-1]["longest"] == 6


def test_failures_are_counted_in_training_and_evaluation(tmp_path):
    def breaks(completion_ids, **_):
        raise RuntimeError("broken")

    trainer = tiny_trainer(tmp_path, rewards=rewards_of(breaks), steps=1, eval_prompts=tiny_prompts(2))
    state = trainer.train()
    assert state.failures == {"liked/raised": 16 + 2 * 2 * 8}
    assert trainer.rollouts.collector.failures == {}


def test_reward_functions_know_the_step(tmp_path):
    steps = []

    def watches(completion_ids, trainer_state, **_):
        steps.append(trainer_state.global_step)
        return liked(completion_ids)

    rewards = RewardSet([NamedReward(name="watches", function=watches)])
    tiny_trainer(tmp_path, "dph-rl", rewards=rewards, steps=2, eval_prompts=tiny_prompts(2)).train()
    assert steps[0] == 0
    assert steps[-4:] == [0, 0, 1, 2], "an evaluation, two steps, an evaluation"


@pytest.fixture
def fresh_accelerate():
    """Which keeps its precision for the life of a process otherwise."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerate")
def test_mixed_precision_samples_from_the_policy_that_learns(tmp_path):
    def gap(**more):
        trainer = tiny_trainer(tmp_path / str(len(more)), steps=1, **more)
        trainer.train()
        assert next(trainer.model.parameters()).dtype == torch.float32
        return trainer.history.read()[0]["sampling/logprob_difference"]

    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    # Without autocast in the generation it would be that of rounding.
    model = tiny_policy()
    plain = EmbeddedGenerator(model, eos_token_ids=ENDS, pad_token_id=PAD)
    plain.generate = torch.autocast("cpu", enabled=False)(plain.generate)
    assert gap(accelerator=accelerator) < 0.5 * gap(accelerator=accelerator, model=model, generator=plain)


def test_special_tokens_are_no_part_of_the_text(tmp_path):
    trainer = tiny_trainer(tmp_path)
    groups = trainer.rollouts.sample(trainer.state).groups
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    ended = [rollout for rollout in rollouts if not rollout.is_truncated]
    assert ended
    assert all("<end>" not in rollout.text for rollout in rollouts)
    assert tiny_tokenizer().decode(list(ended[0].completion_ids), skip_special_tokens=True) == ended[0].text


def test_the_learning_rate_follows_the_updates_that_were_taken(tmp_path):
    calls = []

    def uninformative_at_first(completion_ids, **_):
        calls.append(True)
        return liked(completion_ids) if len(calls) > 1 else [0.0 for _ in completion_ids]

    trainer = tiny_trainer(
        tmp_path,
        rewards=rewards_of(uninformative_at_first),
        mini_batches=2,
        lr_scheduler="linear",
        learning_rate=0.06,
    )
    optimizer, rates = trainer.learner.updater.optimizer, []
    step = optimizer.step

    def noted():
        rates.append(optimizer.param_groups[0]["lr"])
        step()

    optimizer.step = noted
    trainer.train()
    assert rates == pytest.approx([0.06, 0.05, 0.04, 0.03])
    shown = [row["learning_rate"] for row in trainer.history.read()]
    assert shown == pytest.approx([0.06, 0.05, 0.03]), "of the last update"
    assert [row["updates"] for row in trainer.history.read()] == [0, 2, 4]


def test_rows_and_completions_are_shown_as_often_as_is_wanted(tmp_path):
    shown = []
    trainer = tiny_trainer(tmp_path, steps=5, logging_steps=2, on_row=lambda row: shown.append(row["step"]))
    trainer.train()
    assert shown == [2, 4, 5]
    assert [row["step"] for row in trainer.history.read()] == [1, 2, 3, 4, 5]
    kept = trainer.completions.read()
    assert [row["step"] for row in kept] == [2] * 4 + [4] * 4
    assert set(kept[0]) == {"step", "prompt", "completion", "reward"}
