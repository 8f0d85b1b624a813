"""The contract of reward functions."""

import asyncio
import logging
import math
import time

import numpy as np
import pytest
import torch
from moekit.rl.rewards.reward_set import RewardSet

from .reward_sets import reward_set, score

# ---- the contract


def test_functions_are_called_as_trl_calls_them():
    seen = {}

    def watch(**kwargs):
        seen.update(kwargs)
        return [0.0, 0.0]

    chat = [[{"role": "assistant", "content": text}] for text in ("a", "b")]
    prompts = [[{"role": "user", "content": "q"}]] * 2
    hidden = {"prompt": [1, 2], "completion": ["x", "y"]}
    score(reward_set(watch), chat, prompts=prompts, step=7, answer=["3", "4"], **hidden)
    assert seen["prompts"] == prompts
    assert seen["completions"] == chat
    assert seen["completion_ids"] == [[1, 2], [1, 2]]
    assert seen["answer"] == ["3", "4"]
    assert seen["trainer_state"].global_step == 7
    assert callable(seen["log_metric"])
    assert not {"prompt", "completion"} & seen.keys()


def test_sum_is_weighted_and_leaves_out_none():
    def first(completions, **_):
        return [1.0, None, None]

    def second(completions, **_):
        return [2, True, None]

    scored = score(reward_set(first, second, weights=[1.0, 0.5]), ["a", "b", "c"])
    torch.testing.assert_close(scored.rewards, torch.tensor([2.0, 0.5, math.nan]), equal_nan=True)
    torch.testing.assert_close(
        scored.by_function["first"], torch.tensor([1.0, math.nan, math.nan]), equal_nan=True
    )
    assert scored.rewards.dtype == torch.float32
    assert scored.failures == {}


@pytest.mark.parametrize("make", [np.array, torch.tensor, tuple])
def test_arrays_and_tensors_are_lists_too(make):
    def array(completions, **_):
        return make([1.0, 2.0])

    assert score(reward_set(array), ["a", "b"]).rewards.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "'broken' returned 1 values for 2 completions"),
        (None, "'broken' returned NoneType, not a list"),
        ("ab", "'broken' returned str, not a list"),
        ({0: 1.0, 1: 2.0}, "'broken' returned dict, not a list"),
    ],
)
def test_return_of_another_length_or_kind_is_an_error(returned, message):
    def broken(completions, **_):
        return returned

    with pytest.raises(ValueError, match=message):
        score(reward_set(broken), ["a", "b"])


def test_async_functions_run_together():
    def waits(name):
        async def function(completions, **_):
            await asyncio.sleep(0.2)
            return [1.0] * len(completions)

        function.__name__ = name
        return function

    rewards = reward_set(*(waits(f"f{i}") for i in range(4)))
    started = time.monotonic()
    assert score(rewards, ["a", "b"]).rewards.tolist() == [4.0, 4.0]
    assert time.monotonic() - started < 0.7


def test_functions_cannot_spoil_the_lists_of_others():
    def spoils(completions, **_):
        completions.clear()
        return [0.0]

    def reads(completions, **_):
        return [float(len(c)) for c in completions]

    assert score(reward_set(spoils, reads), ["abc"]).rewards.tolist() == [3.0]


def test_metrics_of_functions_are_averaged():
    def tells(completions, log_metric, log_extra, **_):
        log_metric("seen", 1)
        log_metric("seen", 2)
        log_extra("column", completions)
        return [0.0]

    assert score(reward_set(tells), ["a"]).metrics == {"seen": 1.5}


# ---- failures


def test_only_the_guilty_completion_is_lost(caplog):
    def picky(completions, answer, **_):
        if "bad" in completions:
            raise KeyError("bad")
        return [float(a) for a in answer]

    def fine(completions, **_):
        return [1.0] * len(completions)

    rewards = reward_set(picky, fine)
    with caplog.at_level(logging.WARNING):
        scored = score(rewards, ["a", "bad", "c"], answer=[1, 2, 3])
        score(rewards, ["bad"], answer=[1])
    # Without the failed part its sum would be compared with sums that have it.
    torch.testing.assert_close(scored.rewards, torch.tensor([2.0, math.nan, 4.0]), equal_nan=True)
    assert scored.by_function["fine"].tolist() == [1.0, 1.0, 1.0]
    assert scored.failures == {"picky/raised": 1}
    assert [r.getMessage().count("KeyError: 'bad'") for r in caplog.records] == [1], "told once"


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (math.nan, "not finite"),
        (math.inf, "not finite"),
        (1e300, "not finite"),
        (10**400, "not finite"),
        ("1", "wrong type"),
        (1j, "wrong type"),
        ([1.0], "wrong type"),
    ],
)
def test_values_that_are_no_rewards(value, kind):
    def odd(completions, **_):
        return [value, 1.0]

    scored = score(reward_set(odd), ["a", "b"])
    torch.testing.assert_close(scored.rewards, torch.tensor([math.nan, 1.0]), equal_nan=True)
    assert scored.failures == {f"odd/{kind}": 1}


def test_hanging_call_costs_its_completion():
    def hangs(completions, **_):
        if "bad" in completions:
            time.sleep(0.6)
        return [1.0] * len(completions)

    scored = score(reward_set(hangs, timeout_seconds=0.1), ["a", "bad", "c"])
    torch.testing.assert_close(scored.rewards, torch.tensor([1.0, math.nan, 1.0]), equal_nan=True)
    assert scored.failures == {"hangs/hung": 1}


def test_hanging_async_call_is_cancelled():
    cancelled = []

    async def hangs(completions, **_):
        try:
            if "bad" in completions:
                await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.append(completions)
            raise
        return [1.0] * len(completions)

    scored = score(reward_set(hangs, timeout_seconds=0.1, max_hung=1), ["a", "bad", "c"])
    assert scored.failures == {"hangs/hung": 1}
    assert cancelled == [["a", "bad", "c"], ["bad"]]


def test_too_many_hanging_calls_are_an_error():
    def hangs(completions, **_):
        time.sleep(1.5)
        return [1.0] * len(completions)

    with pytest.raises(ValueError, match=r"3 calls of reward functions hang, each for more than 0\.05 s"):
        score(reward_set(hangs, timeout_seconds=0.05, max_hung=2), ["a", "b", "c"])


def test_calls_that_end_late_are_forgiven():
    def slow(completions, **_):
        time.sleep(0.12 if len(completions) > 1 else 0)
        return [1.0] * len(completions)

    rewards = reward_set(slow, timeout_seconds=0.08, max_hung=1)
    for _ in range(3):
        assert score(rewards, ["a", "b"]).rewards.tolist() == [1.0, 1.0]
        time.sleep(0.08)


def test_infinite_time_out_calls_in_the_same_thread():
    import threading

    def here(completions, **_):
        return [float(threading.current_thread() is threading.main_thread())]

    assert score(reward_set(here, timeout_seconds=math.inf), ["a"]).rewards.tolist() == [1.0]
    assert score(reward_set(here), ["a"]).rewards.tolist() == [0.0]


# ---- what is refused before the work


def test_functions_and_sets_that_are_refused():
    def narrow(completions):
        return [0.0]

    def wide(completions, **_):
        return [0.0]

    with pytest.raises(ValueError, match=r"'narrow': the function must accept \*\*kwargs"):
        reward_set(narrow)
    with pytest.raises(ValueError, match=r"share the names \['wide'\]"):
        reward_set(wide, wide)
    with pytest.raises(ValueError, match="no reward function"):
        RewardSet([])
    with pytest.raises(ValueError, match="time-out of 0"):
        reward_set(wide, timeout_seconds=0.0)
    with pytest.raises(ValueError, match="weight nan is not finite"):
        reward_set(wide, weights=[math.nan])


def test_missing_and_clashing_columns_are_named():
    def wants(completions, solution, level=1, **_):
        return [0.0]

    with pytest.raises(ValueError, match=r"asks for the columns \['solution'\].* they have: answer"):
        score(reward_set(wants), ["a"], answer=["1"])
    with pytest.raises(ValueError, match=r"\['completions'\] have names"):
        reward_set(wants).check_columns(["completions", "solution"])
    with pytest.raises(ValueError, match="different lengths"):
        score(reward_set(wants), ["a"], solution=["1", "2"])
