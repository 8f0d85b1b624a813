"""The content of a report: what is refused, how it is summed up, what the verdict says."""

from dataclasses import replace

import numpy as np
import pytest
from moekit.compress.fidelity import DomainFidelity, Estimate
from moekit.compress.report_content import DomainRow, LayerReport, verdict

from .report_samples import make_content, make_domain, make_layer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"usage": [1.0]}, "usage has 1 entries, not 8"),
        ({"group_of": [0] * 9}, "group_of has 9 entries, not 8"),
        ({"similarity": np.eye(3)}, r"similarity is \(3, 3\), not \(8, 8\)"),
        ({"too_few": [8]}, r"experts \[8\] are not in 0..7"),
    ],
)
def test_layer_refuses_parts_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        replace(make_layer("m", 8, 4), **change)


def test_groups_list_the_most_used_expert_first():
    layer = LayerReport(
        name="m", num_experts=4, num_kept=2, usage=[0.1, 0.4, 0.5, 0.0], group_of=[0, 0, 1, None]
    )
    assert layer.groups() == {0: [1, 0], 1: [2]}
    assert layer.removed() == [3]


def test_domain_row_takes_what_fidelity_measures():
    measured = DomainFidelity(
        domain="code",
        num_blocks=1,
        num_tokens=63,
        perplexity_original=Estimate(2.0, 1.9, 2.1),
        perplexity_compressed=Estimate(3.0, 2.9, 3.1),
        perplexity_ratio=Estimate(1.5, 1.4, 1.6),
        kl=Estimate(0.2, None, None),
        top1_agreement=Estimate(0.9, 0.8, 0.95),
    )
    row = DomainRow.from_measured(measured)
    assert row.perplexity_change == pytest.approx(0.5)
    assert row.perplexity_change_interval == pytest.approx((0.4, 0.6))
    assert (row.kl, row.kl_interval) == (0.2, None)
    assert (row.top1_agreement, row.top1_agreement_interval) == (0.9, (0.8, 0.95))


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (10.1, "Almost nothing"),
        (10.9, "A little"),
        (12.0, "plain to see: heal it before use (moekit distill)"),
        (25.0, "badly damaged: keep more experts, or heal it before use (moekit distill)"),
        (9.0, "fell by 10.0%"),
    ],
)
def test_verdict_follows_perplexity(after, words):
    overall = make_domain("all", 100, 10.0, after, 0.1, 0.9)
    assert words in verdict(replace(make_content(1), overall=overall, domains=()))


def test_verdict_of_a_model_that_was_healed():
    overall = make_domain("all", 100, 10.0, 25.0, 0.1, 0.9)
    said = verdict(replace(make_content(1), overall=overall, domains=(), is_healed=True))
    assert "badly damaged: keep more experts, or heal it for longer." in said


def test_verdict_names_the_worst_domain_and_what_is_clearly_worse():
    said = verdict(make_content())
    assert "41% smaller" in said
    assert "lost most is code: there it rose by 26.3%." in said
    assert "end in a loop (of 200): clearly worse" in said
    assert "Answers right" not in said, "its intervals overlap"


def test_verdict_admits_a_checkpoint_that_did_not_shrink():
    assert "not smaller" in verdict(replace(make_content(1), num_bytes=(100, 100)))
