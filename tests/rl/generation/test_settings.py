import pytest
from moekit.rl.generation.generator import SampleRequest
from moekit.rl.generation.settings import SamplingSettings


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("top_k", -1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("min_p", float("nan")),
        ("stop", ("ok", "")),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        SamplingSettings(**{"max_new_tokens": 4, field: value})


def test_truncation_is_what_keeps_tokens_from_being_drawn():
    assert not SamplingSettings(max_new_tokens=1, temperature=0.5).truncates
    assert SamplingSettings(max_new_tokens=1, top_k=3).truncates
    assert SamplingSettings(max_new_tokens=1, top_p=0.5).truncates
    assert SamplingSettings(max_new_tokens=1, min_p=0.5).truncates
    assert not SamplingSettings(max_new_tokens=1, min_p=0.5, greedy=True).truncates


@pytest.mark.parametrize(
    ("options", "match"),
    [({"prompt_ids": ()}, "prompt"), ({"num_samples": 0}, "num_samples"), ({"seed": -1}, "seed")],
)
def test_a_request_for_nothing_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        SampleRequest(**{"prompt_ids": (1,), "num_samples": 1, "seed": 0, **options})
