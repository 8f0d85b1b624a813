"""What RL-PLUS and HBPO ask of the policy for one prompt."""

import pytest
from moekit.rl.methods import hbpo, rl_plus
from moekit.rl.rollout import Prompt


class Words:
    """A tokenizer that numbers words; 0 is the end."""

    eos_token_id: int | None = 0

    def __init__(self):
        self.known = ["<end>"]

    def __call__(self, text, *, add_special_tokens):
        assert not add_special_tokens
        words = text.split()
        self.known += [w for w in dict.fromkeys(words) if w not in self.known]
        return {"input_ids": [self.known.index(w) for w in words]}

    def text(self, ids):
        return " ".join(self.known[i] for i in ids)


def prompt(**columns):
    return Prompt(index=5, text="q", ids=(1,), given="q", columns=columns)


def test_rl_plus_adds_the_demonstration_with_one_end_token():
    for text in ("so it is", "so it is <end>"):
        words = Words()
        (request,) = rl_plus.shaper(prompt(demonstration=text), 8, words, 100)
        assert request.num_samples == 7
        assert words.text(request.demonstration_ids) == "so it is <end>"
        assert request.forced_ids == ()


def test_rl_plus_reads_the_column_that_it_is_told():
    words = Words()
    (request,) = rl_plus.shaper(prompt(solution="yes"), 2, words, 100, demonstration_column="solution")
    assert words.text(request.demonstration_ids) == "yes <end>"


@pytest.mark.parametrize("columns", [{}, *({"demonstration": text} for text in (None, " ", 3))])
def test_rl_plus_refuses_a_row_without_demonstration(columns):
    with pytest.raises(ValueError, match="row 6 has demonstration"):
        rl_plus.shaper(prompt(**columns), 8, Words(), 100)


def test_rl_plus_refuses_a_tokenizer_without_end_token():
    words = Words()
    words.eos_token_id = None
    with pytest.raises(ValueError, match="end token"):
        rl_plus.shaper(prompt(demonstration="a"), 8, words, 100)


def test_hbpo_divides_the_group_among_the_budgets_of_the_paper():
    words = Words()
    requests = hbpo.shaper(prompt(), 16, words, 4096)
    assert [r.budget for r in requests] == [512, 1024, 2048, 2560]
    assert [r.num_samples for r in requests] == [4] * 4
    assert all(r.trains_forced for r in requests)
    assert words.text(requests[1].forced_ids) == "I will answer the question within 1024 tokens"


def test_hbpo_settings():
    words = Words()
    requests = hbpo.shaper(
        prompt(),
        4,
        words,
        10,
        budgets=(0.01, 1.0),
        budget_prefix="<think> {budget}",
        train_on_budget_prefix=False,
    )
    assert [r.budget for r in requests] == [1, 10]
    assert words.text(requests[1].forced_ids) == "<think> 10"
    assert not any(r.trains_forced for r in requests)


@pytest.mark.parametrize(
    ("group", "settings", "said"),
    [
        (6, {}, "6 completions cannot be divided among 4 budgets"),
        (4, {"budgets": ()}, "budgets"),
        (4, {"budgets": (0.5, 0.5)}, "different"),
        (4, {"budgets": (0.0, 0.5)}, "shares"),
        (4, {"budgets": (0.5, 512.0)}, "shares"),
        (4, {"budgets": (0.5, float("nan"))}, "shares"),
        (4, {"budget_prefix": "be short"}, "budget_prefix"),
    ],
)
def test_hbpo_refuses(group, settings, said):
    with pytest.raises(ValueError, match=said):
        hbpo.shaper(prompt(), group, Words(), 100, **settings)
