"""What each of moekit's own rewards gives."""

from types import SimpleNamespace

import pytest
from moekit.rl.rewards.answers import final_answer
from moekit.rl.rewards.exact_match import exact_match
from moekit.rl.rewards.format import format_match
from moekit.rl.rewards.names import REWARDS, load_reward
from moekit.rl.rewards.number import last_number, number_match
from moekit.rl.rewards.reward_set import RewardSet
from moekit.rl.rewards.soft_overlong import soft_overlong

from .reward_sets import score

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
