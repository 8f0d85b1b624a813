"""What cannot be trained is refused when the trainer is made, before anything is sampled."""

import re
from dataclasses import replace

import pytest
from moekit.rl import (
    ALGORITHMS,
    NamedReward,
    PolicySettings,
    PolicyTrainer,
    Request,
    RewardSet,
    make_prompts,
)

from .tiny_rl import SETTINGS, WORDS, rewards_of, tiny_policy, tiny_prompts, tiny_tokenizer, tiny_trainer


class NoGenerator:
    """Samples nothing."""

    def generate(self, requests, settings):
        raise AssertionError("something was sampled")


def refused(tmp_path, name, message, **given):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, name, generator=NoGenerator(), **given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [name for name, method in ALGORITHMS.items() if method.min_group > 1])
def test_groups_of_one(tmp_path, name):
    refused(tmp_path, name, "num_generations=1: .* needs at least 2", num_generations=1)


@pytest.mark.parametrize("name", ["reinforce", "rloo", "gtpo"])
def test_more_updates_than_the_mathematics_holds_for(tmp_path, name):
    refused(
        tmp_path,
        name,
        "at most 1 update of each rollout, and mini_batches=1 x .*=2 makes 2",
        num_iterations=2,
    )


@pytest.mark.parametrize("name", ["kl-cov", "rover"])
def test_fewer_updates_than_the_method_needs(tmp_path, name):
    refused(tmp_path, name, "does nothing of its own with 1 update .* raise mini_batches", mini_batches=1)


def test_prompts_that_mini_batches_cannot_share(tmp_path):
    refused(tmp_path, "grpo", "prompts_per_step=4 cannot be divided .* a multiple of 3", mini_batches=3)


def test_rewards_of_several_processes_that_would_be_scaled_together():
    algorithm = ALGORITHMS["grpo"].with_settings(scale_rewards="batch")
    settings = PolicySettings(**SETTINGS)
    settings.check(algorithm, 1)
    settings.check(ALGORITHMS["grpo"], 2)
    with pytest.raises(ValueError, match=r"scale_rewards='batch' .* 2 processes knows only its own"):
        settings.check(algorithm, 2)


def test_a_row_without_demonstration(tmp_path):
    rows = [
        {"prompt": "a", "demonstration": "b"},
        {"prompt": "b", "demonstration": " "},
        {"prompt": "c"},
    ]
    for bad in (rows[:2], [rows[0], rows[2]]):
        prompts = make_prompts(bad, tiny_tokenizer())
        refused(tmp_path, "rl-plus", "row 2 has demonstration=", prompts=prompts)


def test_a_group_that_budgets_cannot_share(tmp_path):
    refused(tmp_path, "hbpo", "6 completions cannot be divided among 4 budgets", num_generations=6, method={})


def test_forced_tokens_that_leave_nothing_to_the_policy(tmp_path):
    method = {"budgets": (0.5, 1.0), "budget_prefix": "a b c d e {budget}"}
    refused(tmp_path, "hbpo", "begins completions with 6 tokens, and max_completion_length=6", method=method)


def test_a_shaper_whose_groups_differ_in_size(tmp_path):
    def shaper(prompt, num_generations, tokenizer, max_completion_length):
        return [Request(num_samples=num_generations + prompt.index % 2)]

    with pytest.raises(ValueError, match="makes 5 completions of prompt 1, and num_generations=4"):
        PolicyTrainer(
            tiny_policy(),
            tiny_tokenizer(),
            replace(ALGORITHMS["grpo"], shaper=shaper),
            rewards_of(),
            tiny_prompts(),
            PolicySettings(**SETTINGS),
            folder=tmp_path,
        )


def test_data_without_a_column_that_a_reward_needs(tmp_path):
    def needs_answer(completions, answer, **_):
        return [0.0 for _ in completions]

    rewards = RewardSet([NamedReward(name="exact", function=needs_answer)])
    refused(tmp_path, "grpo", r"asks for the columns \['answer'\]", rewards=rewards)
    # Held-out prompts too.
    answered = tiny_prompts(4, answer="a")
    refused(
        tmp_path,
        "grpo",
        "asks for the columns",
        rewards=rewards,
        prompts=answered,
        eval_prompts=tiny_prompts(2),
    )


def test_no_prompts(tmp_path):
    refused(tmp_path, "grpo", "no prompts to train on", prompts=[])


def test_prompts_that_do_not_fit_the_context(tmp_path):
    message = r"longest prompt \(3 tokens\) and max_completion_length=30 do not fit .* 32 tokens"
    refused(tmp_path, "grpo", message, max_completion_length=30)
    long = make_prompts([{"prompt": "a " * 27}], tiny_tokenizer())
    refused(tmp_path, "grpo", r"longest prompt \(27 tokens\)", eval_prompts=long)


def without_ends():
    model = tiny_policy()
    model.generation_config.eos_token_id = None
    return model


def test_a_policy_that_cannot_end(tmp_path):
    tokenizer = tiny_tokenizer(eos_token=None)
    refused(tmp_path, "grpo", "has an end token", model=without_ends(), tokenizer=tokenizer)
    # One that is outside of the model's vocabulary is none.
    tokenizer.add_special_tokens({"eos_token": "<far>"})
    assert tokenizer.eos_token_id == len(WORDS)
    refused(tmp_path, "grpo", "vocabulary of 40", model=without_ends(), tokenizer=tokenizer)


def test_no_padding_token_is_an_end_token(tmp_path):
    trainer = tiny_trainer(tmp_path, tokenizer=tiny_tokenizer(pad_token=None))
    assert trainer.rollouts.pad_id == 0
    far = tiny_tokenizer(pad_token=None)
    far.add_special_tokens({"pad_token": "<far>"})
    assert tiny_trainer(tmp_path, tokenizer=far).rollouts.pad_id == 0
    assert tiny_trainer(tmp_path).rollouts.pad_id == 1


def test_an_unknown_schedule(tmp_path):
    for name in ("sometimes", "reduce_lr_on_plateau", "warmup_stable_decay"):
        refused(tmp_path, "grpo", f"lr_scheduler='{name}'", lr_scheduler=name)


def test_router_replay_without_experts(tmp_path):
    dense = tiny_policy(mlp_only_layers=[0, 1])
    refused(tmp_path, "grpo", "router_replay: .* has no experts", model=dense, router_replay=True)


def test_a_policy_of_which_nothing_is_trained(tmp_path):
    refused(tmp_path, "grpo", "no parameter that is trained", model=tiny_policy().requires_grad_(False))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("num_generations", 0),
        ("rehearsal_generations", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("temperature", float("inf")),
        ("rehearsal_share", 0.0),
        ("rehearsal_threshold", 1.5),
        ("beta", -0.1),
        ("eval_steps", -1),
        ("max_grad_norm", float("nan")),
        ("selection_scope", "batch"),
        ("pass_at", float("nan")),
        ("top_p", 0.0),
        ("stop", ("",)),
    ],
)
def test_settings_that_make_no_sense(name, value):
    with pytest.raises(ValueError, match=re.escape(name)):
        PolicySettings(**{**SETTINGS, name: value})
