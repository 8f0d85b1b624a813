"""The contract of reward functions, and what each of moekit's own gives."""

import asyncio
import logging
import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from moekit.rl.rewards.answers import final_answer
from moekit.rl.rewards.exact_match import exact_match
from moekit.rl.rewards.format import format_match
from moekit.rl.rewards.names import REWARDS, load_reward
from moekit.rl.rewards.number import last_number, number_match
from moekit.rl.rewards.reward_set import NamedReward, RewardSet
from moekit.rl.rewards.soft_overlong import soft_overlong


def reward_set(*functions, weights=None, **options) -> RewardSet:
    weights = weights or [1.0] * len(functions)
    named = [
        NamedReward(name=f.__name__, function=f, weight=w) for f, w in zip(functions, weights, strict=True)
    ]
    return RewardSet(named, **options)


def score(rewards, completions, *, step=0, prompts=None, **columns):
    size = len(completions)
    return rewards.score(
        prompts=prompts or ["p"] * size,
        completions=completions,
        completion_ids=[[1, 2]] * size,
        columns=columns,
        step=step,
    )


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


# ---- moekit's own


@pytest.mark.parametrize(
    ("text", "place", "answer"),
    [
        (r"so \boxed{1} or \boxed{\frac{1}{2}}", "boxed", r"\frac{1}{2}"),
        (r"\boxed{7} and an open \boxed{8", "boxed", "7"),
        ("no box", "boxed", None),
        ("<answer> 4 </answer> <answer>5\n</answer>", "tag", "5"),
        ("Answer: 3\n**Answer:** 12 \nbye", "label", "12"),
        (r"Answer: 1 \boxed{2} <answer>3</answer>", "auto", "3"),
        (r"Answer: 1 \boxed{2}", "auto", "2"),
        ("Answer: 1", "auto", "1"),
        (" plain\n", "auto", "plain"),
        ("<think>Answer: 1</think> 2", "auto", "2"),
    ],
)
def test_final_answers(text, place, answer):
    assert final_answer(text, place) == answer


def test_exact_match():
    completions = ["Answer: New  York", "new york", [{"role": "assistant", "content": "5"}], "x"]
    answers = ["New York", "New York", 5, None]
    assert exact_match()(completions=completions, answer=answers) == [1.0, 0.0, 1.0, None]
    assert exact_match(ignore_case=True)(completions=completions, answer=answers)[1] == 1.0
    assert exact_match("boxed")(completions=["None"], answer=["None"]) == [0.0]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("costs 1,234.50 in all.", 1234.5),
        ("5-3", 3),
        ("x = -3.", -3),
        ("(−0.5)", -0.5),
        ("1, 2,3", 3),
        ("1,2345", 2345),
        ("6.02e23", 6.02e23),
        ("1e999999999999", 999999999999),
        (".25", 0.25),
        ("#### 18", 18),
    ],
)
def test_last_number(text, number):
    assert float(last_number(text)) == number


def test_number_match():
    reward = number_match()
    completions = ["it is 3.0", "Answer: 4 (not 3)", "none", "3"]
    assert reward(completions=completions, answer=["#### 3", "3", 3, "?"]) == [1.0, 1.0, 0.0, None]
    assert last_number("none") is None


def test_format_match():
    good = "<think>a\nb</think>\n<answer>1</answer>"
    bad = [f"x{good}", good + good, "<answer>1</answer>", "<think></answer></think><answer>"]
    assert format_match()(completions=[good, *bad]) == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert format_match(r"\d+.*")(completions=["1\na", "a1"]) == [1.0, 0.0]
    with pytest.raises(ValueError, match="no regular expression"):
        format_match("(")


def test_soft_overlong_follows_dapo():
    reward = soft_overlong(100, cache_length=20)
    lengths = [1, 80, 90, 100, 120]
    assert reward(completion_ids=[[0] * n for n in lengths]) == [0.0, 0.0, -0.5, -1.0, -1.0]
    assert soft_overlong(100)(completion_ids=[[0] * 90]) == [-0.5]
    with pytest.raises(ValueError, match=r"cache_length=101 is not in 1\.\.100"):
        soft_overlong(100, cache_length=101)


def test_soft_overlong_is_that_of_trl():
    trl = pytest.importorskip("trl.rewards")
    ids = [[0] * n for n in range(1, 130, 7)]
    assert soft_overlong(100, 33)(completion_ids=ids) == pytest.approx(
        trl.get_soft_overlong_punishment(100, 33)(completion_ids=ids)
    )


# ---- by name


def test_rewards_load_by_name():
    loaded = load_reward("soft-overlong", weight=0.5, max_completion_length=10)
    assert (loaded.name, loaded.weight) == ("soft-overlong", 0.5)
    assert loaded.function(completion_ids=[[0] * 10]) == [-1.0]
    for name in REWARDS:
        assert load_reward(name, max_completion_length=10).name == name
    with pytest.raises(ValueError, match="needs max_completion_length"):
        load_reward("soft-overlong")
    with pytest.raises(ValueError, match="no reward 'exact'; there are: exact-match, number, math"):
        load_reward("exact")


def test_rewards_load_from_files_and_modules(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    b: int\n"
        "def brevity(completions, **kwargs):\n    return [-len(c) for c in completions]\nlimit = 3\n"
    )
    loaded = load_reward(f"{file}:brevity")
    assert loaded.name == "brevity"
    assert loaded.function(completions=["abc"]) == [-3]
    with pytest.raises(ValueError, match="has no function 'brevety'; it has: brevity"):
        load_reward(f"{file}:brevety")
    with pytest.raises(ValueError, match="does not exist"):
        load_reward(f"{tmp_path}/other.py:f")
    with pytest.raises(ValueError, match=r"importing 'no_such_module' .* path/to/file\.py"):
        load_reward("no_such_module:f")
    file.write_text("raise RuntimeError('half done')")
    with pytest.raises(ValueError, match="RuntimeError: half done"):
        load_reward(f"{file}:brevity")


# ---- judged in another process


@pytest.fixture(scope="module")
def math_reward():
    return load_reward("math")


def test_math_compares_values_not_letters(math_reward):
    completions = [
        r"<think>\boxed{9}</think> so \boxed{0.5}",
        r"it is $\frac{2}{4}$",
        r"\boxed{3}",
        r"\boxed{1000}",
        "The result is 18.",
        [{"role": "assistant", "content": r"\boxed{\{2, 1\}}"}],
    ]
    answers = [r"\frac{1}{2}", "1/2", "4", "1,000", "9 + 9 = 18\n#### 18", r"\{1,2\}"]
    assert math_reward.function(completions=completions, answer=answers) == [1, 1, 0, 1, 1, 1]
    assert math_reward.function(completions=[r"\boxed{2}"], solution=[r"Hence \boxed{2}."]) == [1.0]
    assert math_reward.function(completions=["1"], answer=[None]) == [None]


def test_math_goes_on_after_an_answer_that_never_ends(math_reward):
    from moekit.rl.rewards.math_verify import math_equal

    quick = math_equal(seconds=0.5)
    completions = [r"\boxed{7}", r"\boxed{9^{9^{9^{9}}}}", r"\boxed{7}"]
    assert quick(completions=completions, answer=["7", "7", "7"]) == [1.0, 0.0, 1.0]


@pytest.mark.slow
def test_answer_that_keeps_the_interpreter_to_itself_is_ended(tmp_path, monkeypatch):
    from moekit.rl.rewards import checker

    program = checker._PROGRAM.read_text().replace(
        "check = CHECKERS[kind]()", "check = lambda power: float((n := power) ** n**n > 0)"
    )
    (tmp_path / "program.py").write_text(program)
    monkeypatch.setattr(checker, "_PROGRAM", tmp_path / "program.py")
    hog = checker.Checker("math", "math_verify", seconds=0.2)
    assert [hog.ask(power=n) for n in (2, 9, 2)] == [1.0, 0.0, 1.0]


def test_process_that_died_is_started_again():
    from moekit.rl.rewards.checker import Checker

    checker = Checker("math", "math_verify", seconds=5.0)
    assert checker.ask(gold="1", text="1") == 1.0
    checker._process.kill()
    checker._process.wait()
    assert checker.ask(gold="1", text="1") == 1.0


def test_math_without_right_answers_fails_by_name(math_reward):
    rewards = RewardSet([math_reward])
    assert score(rewards, ["1"], other=["1"]).failures == {"math/raised": 1}


def test_reasoning_gym_scores_with_its_own_scorer():
    gym = pytest.importorskip("reasoning_gym")
    import json

    row = gym.create_dataset("countdown", size=1, seed=3)[0]
    reward = load_reward("reasoning-gym")
    right, other = row["answer"], "(" + row["answer"] + ")"
    completions = [f"<answer>{right}</answer>", f"Answer: {other}", "1 + 1"]
    columns = {"answer": [right] * 3, "metadata": [row["metadata"], json.dumps(row["metadata"]), None]}
    scores = reward.function(completions=completions, **columns)
    assert scores[:2] == [1.0, 1.0], "another expression with the same value is right too"
    assert scores[2] is None
    broken = score(RewardSet([reward]), ["1"], answer=["1"], metadata=[{"source_dataset": "no such"}])
    assert broken.failures == {"reasoning-gym/raised": 1}


def test_missing_package_is_told_before_the_work(monkeypatch):
    from moekit.rl.rewards import checker

    monkeypatch.setattr(checker, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda _: None)))
    with pytest.raises(ValueError, match=r"'math' needs the package math_verify; install moekit\[rl\]"):
        load_reward("math")
