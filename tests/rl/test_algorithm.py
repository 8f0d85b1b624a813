"""Rows, their settings, and that the table of rows agrees with itself."""

import inspect
from typing import Literal

import pytest
from moekit.rl import ALGORITHMS
from moekit.rl.algorithm import Algorithm


def advantage(batch, context, *, scale: Literal["group", "none"] = "group", offset: float = 0.5):
    return batch + offset


def policy_loss(
    now, batch, context, *, epsilon: float = 0.2, epsilon_high: float | None = None, same: int = 1
):
    return epsilon, epsilon_high, same


def shaper(
    prompt, n, tokenizer, longest, *, same: int = 1, shares: tuple[float, ...] = (0.5,), on: bool = True
):
    return same, shares, on


def row(**changes):
    values = {"title": "Row", "paper": "0000.00000", "advantage": advantage, "policy_loss": policy_loss}
    return Algorithm(**{**values, "shaper": shaper, **changes})


def test_settings_are_the_keyword_only_arguments_of_all_functions():
    found = row(settings={"epsilon": 0.3}).hyperparameters()
    assert found == {
        "scale": "group",
        "offset": 0.5,
        "epsilon": 0.3,
        "epsilon_high": None,
        "same": 1,
        "shares": (0.5,),
        "on": True,
    }


def test_functions_are_bound_to_the_settings():
    changed = row().with_settings(epsilon=0.1, epsilon_high=0.4, same=3, shares=[0.25, 1], on=False)
    assert changed.bound("policy_loss")(None, None, None) == (0.1, 0.4, 3)
    assert changed.bound("shaper")(None, 1, None, 1) == (3, (0.25, 1.0), False)
    assert row().bound("policy_loss")(None, None, None) == (0.2, None, 1)
    assert row().bound("selection") is None
    assert changed.with_settings(same=4).bound("shaper")(None, 1, None, 1)[0] == 4


def test_whole_numbers_become_floats_where_floats_are_wanted():
    value = row().with_settings(epsilon=1).hyperparameters()["epsilon"]
    assert type(value) is float
    assert type(row().with_settings(epsilon_high=2).hyperparameters()["epsilon_high"]) is float
    assert row().with_settings(epsilon_high=None).hyperparameters()["epsilon_high"] is None


def test_an_unknown_setting_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"Row has no setting 'clip'; its settings: epsilon, epsilon_high"):
        row().with_settings(clip=0.1)
    bare = row(advantage=lambda b, c: b, policy_loss=lambda n, b, c: n, shaper=None)
    with pytest.raises(ValueError, match="its settings: none"):
        bare.with_settings(clip=0.1)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("epsilon", "0.1", "a finite number"),
        ("epsilon", float("nan"), "a finite number"),
        ("epsilon", float("inf"), "a finite number"),
        ("epsilon", True, "a finite number"),
        ("epsilon", None, "a finite number"),
        ("epsilon_high", "high", "float | None"),
        ("scale", "batch", "'group' or 'none'"),
        ("same", 1.5, "int"),
        ("same", True, "int"),
        ("shares", 0.5, "tuple"),
        ("shares", ["a"], "a finite number"),
        ("on", 1, "bool"),
    ],
)
def test_values_that_do_not_fit_are_refused(name, value, said):
    with pytest.raises(ValueError, match=f"{name}=.*must be") as refusal:
        row().with_settings(**{name: value})
    assert said in str(refusal.value)


def functions(algorithm):
    names = ("advantage", "policy_loss", "regularizer", "shaper", "selection", "observe")
    return [getattr(algorithm, name) for name in names if getattr(algorithm, name) is not None]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_rows_agree_with_themselves(name):
    algorithm = ALGORITHMS[name]
    defaults: dict[str, object] = {}
    for function in functions(algorithm):
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                shared = defaults.setdefault(parameter.name, parameter.default)
                assert shared == parameter.default, f"{parameter.name} has two defaults"
    assert set(algorithm.settings) <= set(defaults)
    assert (
        algorithm.with_settings(**algorithm.hyperparameters()).hyperparameters()
        == algorithm.hyperparameters()
    )
    updates = algorithm.trainer_defaults.get("mini_batches", 1)
    assert algorithm.min_updates <= updates <= (algorithm.max_updates or updates)
    assert algorithm.paper == "Williams, 1992" or algorithm.paper.replace(".", "").isdecimal()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_method_cites_its_paper(name):
    if name in ("reinforce", "dapo", "dr-grpo"):
        return
    paper = ALGORITHMS[name].paper
    assert any(f"arXiv:{paper}" in (f.__doc__ or "") for f in functions(ALGORITHMS[name]))


def test_papers_of_the_variants_of_grpo_are_cited_where_they_are_computed():
    text = "".join(f.__doc__ for f in functions(ALGORITHMS["dapo"]))
    assert all(f"arXiv:{ALGORITHMS[name].paper}" in text for name in ("grpo", "dapo", "dr-grpo"))


def test_observers_need_the_pass_before_the_updates():
    for algorithm in ALGORITHMS.values():
        assert algorithm.observe is None or "old-pass" in algorithm.needs
        assert algorithm.regularizer is None or algorithm.needs & {"rehearsal", "entropy-gradient"}


def test_titles_are_different():
    assert len({a.title for a in ALGORITHMS.values()}) == len(ALGORITHMS)
