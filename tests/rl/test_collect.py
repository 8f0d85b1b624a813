"""Prompts in, groups of rewarded completions out."""

from contextlib import contextmanager

import pytest
import torch
from moekit.rl import ALGORITHMS, NamedReward, RewardSet, Sample, SamplingSettings, make_prompts
from moekit.rl.collect import Collector

from .tiny_rl import END, WORDS, liked, rewards_of, tiny_prompts, tiny_tokenizer

SAMPLING = SamplingSettings(max_new_tokens=6)


class Scripted:
    """Writes what it is told, and notes what it was asked for."""

    def __init__(self, ids=(3, 4, END), is_finished=True):
        self.sample = Sample(tuple(ids), -torch.arange(1.0, len(ids) + 1), is_finished)
        self.requests, self.settings = [], None

    def generate(self, requests, settings):
        self.requests += requests
        self.settings = settings
        return [[self.sample] * request.num_samples for request in requests]


def collector(name="grpo", generator=None, rewards=None, num_generations=4, **method):
    return Collector(
        generator=generator or Scripted(),
        rewards=rewards or rewards_of(),
        tokenizer=tiny_tokenizer(),
        algorithm=ALGORITHMS[name].with_settings(**method),
        num_generations=num_generations,
        max_completion_length=6,
        seed=0,
    )


def collect(asked, prompts=None, *, place=("rollout", 2)):
    prompts = tiny_prompts(3) if prompts is None else prompts
    return asked.collect(list(enumerate(prompts)), SAMPLING, place=place, step=2, version=5)


def test_a_group_for_each_prompt():
    groups = collect(collector())
    assert [group.prompt for group in groups] == tiny_prompts(3)
    for group in groups:
        assert len(group.rollouts) == 4
        for rollout in group.rollouts:
            assert rollout.completion_ids == (3, 4, END)
            assert rollout.text == "a b"
            assert rollout.policy_version == 5
            assert rollout.source == "policy"
            assert not rollout.is_truncated
            assert rollout.sampling_logprobs.tolist() == [-1, -2, -3]
        assert group.rewards.tolist() == pytest.approx([2 / 3] * 4)
        assert list(group.rewards_by_function) == ["liked"]


def test_seeds_depend_on_the_place_and_the_number_alone():
    def seeds(place, prompts):
        generator = Scripted()
        collect(collector(generator=generator), prompts, place=place)
        return [request.seed for request in generator.requests]

    first = seeds(("rollout", 0), tiny_prompts(3))
    assert seeds(("rollout", 0), tiny_prompts(6)[3:]) == first
    assert seeds(("rollout", 0), tiny_prompts(2)) == first[:2]
    others = seeds(("rollout", 1), tiny_prompts(3)) + seeds(("evaluation",), tiny_prompts(3))
    assert len({*first, *others}) == 9


def test_budgets_begin_completions_and_are_cut_at_the_limit():
    generator = Scripted(ids=(3, 4, 5, 6, 7, 8), is_finished=False)
    hbpo = collector("hbpo", generator, budgets=(0.5, 1.0), budget_prefix="z {budget}")
    (group,) = collect(hbpo, tiny_prompts(1))
    three, six = ((WORDS.index("z"), WORDS.index(number)) for number in ("3", "6"))
    assert [request.prompt_ids[-2:] for request in generator.requests] == [three, six]
    assert generator.settings.max_new_tokens == 4, "what they may still write"
    assert [rollout.budget for rollout in group.rollouts] == [3, 3, 6, 6]
    for rollout, forced in zip(group.rollouts, [three, three, six, six], strict=True):
        assert rollout.completion_ids == (*forced, 3, 4, 5, 6)
        assert rollout.is_truncated
        assert rollout.sampling_logprobs.tolist() == [0, 0, -1, -2, -3, -4]
        assert rollout.loss_mask.all(), "the released code trains the prefix too"


@pytest.mark.parametrize(("text", "ids", "is_cut"), [("a b", (3, 4, END), False), ("a " * 7, (3,) * 6, True)])
def test_a_demonstration_joins_the_group(text, ids, is_cut):
    prompts = make_prompts([{"prompt": "c", "demonstration": text}], tiny_tokenizer())
    (group,) = collect(collector("rl-plus"), prompts)
    *samples, demonstration = group.rollouts
    assert len(samples) == 3
    assert demonstration.completion_ids == ids
    assert demonstration.source == "demonstration"
    assert demonstration.is_truncated == is_cut
    assert demonstration.sampling_logprobs is None
    assert group.rewards[-1] == pytest.approx(liked([ids])[0]), "it is judged as the others"


def test_what_rewards_are_given():
    seen = {}

    def watches(prompts, completions, completion_ids, answer, trainer_state, **rest):
        seen.update(p=prompts, c=completions, i=completion_ids, a=answer, s=trainer_state.global_step, r=rest)
        return [0.0 for _ in prompts]

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    chat = [{"role": "user", "content": "b"}]
    rows = [{"prompt": "a", "answer": 1, "more": 2}, {"prompt": chat, "answer": 3}]
    rewards = RewardSet([NamedReward(name="watches", function=watches)])
    collect(collector(rewards=rewards, num_generations=2), make_prompts(rows, tokenizer))
    answer = [{"role": "assistant", "content": "a b"}]
    assert seen["p"] == ["a", "a", chat, chat]
    assert seen["c"] == ["a b", "a b", answer, answer]
    assert seen["i"] == [[3, 4, END]] * 4
    assert (seen["a"], seen["s"], seen["r"]["more"]) == ([1, 1, 3, 3], 2, [2, 2, None, None])


def test_failures_and_what_was_told_add_up():
    def fails_on_long(completion_ids, log_metric, **_):
        log_metric("count", len(completion_ids))
        if len(completion_ids) == 1:
            raise RuntimeError
        return [1.0, *[float("nan")] * (len(completion_ids) - 1)]

    asked = collector(rewards=rewards_of(fails_on_long))
    for _ in range(2):
        collect(asked, tiny_prompts(1))
    assert asked.failures == {"liked/not finite": 6}
    assert asked.told == {"count": (32.0, 8)}


def test_a_process_without_prompts_comes_along():
    entered = []

    @contextmanager
    def whole_weights():
        entered.append(True)
        yield

    asked = collector(generator=Scripted(), rewards=rewards_of())
    asked.whole_weights = whole_weights
    assert collect(asked, []) == []
    assert entered == [True]
    assert asked.generator.requests == []
