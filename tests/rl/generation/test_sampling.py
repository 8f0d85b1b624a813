import pytest
import torch
from moekit.rl.generation.sampling import draw_tokens, request_uniforms, truncate
from moekit.rl.generation.settings import SamplingSettings
from scipy.stats import chisquare
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

PLAIN = SamplingSettings(max_new_tokens=1)


def settings(**options) -> SamplingSettings:
    return SamplingSettings(max_new_tokens=1, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.3},
        {"temperature": 1.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1},
    ],
)
def test_tokens_come_as_often_as_their_probability(options):
    chosen = settings(**options)
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, -2.0])
    probs = truncate(logits.unsqueeze(0) / chosen.temperature, chosen).softmax(-1)[0]
    uniforms = request_uniforms(0, 20_000, 1)[:, 0]
    tokens, _ = draw_tokens(logits.expand(20_000, -1), uniforms, chosen)
    counts = tokens.bincount(minlength=6)
    allowed = probs > 0
    assert counts[~allowed].sum() == 0
    expected = probs[allowed].double() / probs[allowed].double().sum() * 20_000
    assert chisquare(counts[allowed], expected).pvalue > 0.01


@pytest.mark.parametrize("top_k", [0, 1, 5, 99])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
@pytest.mark.parametrize("min_p", [0.0, 0.1, 1.0])
def test_what_stays_is_what_transformers_keeps(top_k, top_p, min_p):
    logits = 3 * torch.randn(64, 40)
    logits[:8] = logits[:8].round()  # ties
    warpers = LogitsProcessorList()
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    wanted = warpers(torch.zeros(64, 1, dtype=torch.long), logits)
    kept = truncate(logits, settings(top_k=top_k, top_p=top_p, min_p=min_p))
    if min_p == 1:  # transformers keeps one of several equally probable tokens
        assert torch.equal(kept[8:], wanted[8:])
    else:
        assert torch.equal(kept, wanted)


@pytest.mark.parametrize("options", [{}, {"greedy": True}, {"top_k": 2}, {"top_p": 0.5, "min_p": 0.2}])
def test_logprobs_are_those_of_the_scaled_whole_vocabulary(options):
    chosen = settings(temperature=0.7, **options)
    logits = 4 * torch.randn(16, 50)
    tokens, logprobs = draw_tokens(logits, request_uniforms(3, 16, 1)[:, 0], chosen)
    wanted = (logits / 0.7).log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(logprobs, wanted, rtol=0, atol=1e-5)
    assert logprobs.dtype == torch.float32
    if chosen.greedy:
        assert torch.equal(tokens, logits.argmax(-1))


def test_a_token_of_probability_zero_is_not_drawn_at_the_edges():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    almost_one = 1 - 2**-53
    for uniform, token in [(0.0, 1), (0.5 - 1e-9, 1), (0.5, 3), (almost_one, 3)]:
        drawn, logprobs = draw_tokens(logits, torch.tensor([uniform], dtype=torch.float64), PLAIN)
        assert drawn.item() == token
        assert logprobs.item() == pytest.approx(-0.6931472)


def test_a_rare_token_can_be_drawn():
    logits = torch.tensor([[0.0, -20.0]])  # probability 2e-9, below the steps of a float32 uniform number
    drawn, _ = draw_tokens(logits, torch.tensor([1 - 1e-9], dtype=torch.float64), PLAIN)
    assert drawn.item() == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"greedy": True}, {"top_p": 0.5}])
def test_unusable_logits_give_nan_and_a_token_that_exists(bad, options):
    logits = torch.zeros(2, 5)
    logits[0, 3] = bad
    tokens, logprobs = draw_tokens(logits, torch.full((2,), 0.9, dtype=torch.float64), settings(**options))
    assert logprobs.isnan().tolist() == [True, False]
    assert (tokens < 5).all()


def test_a_row_without_a_finite_logit_gives_nan():
    _, logprobs = draw_tokens(torch.full((1, 4), -torch.inf), torch.zeros(1, dtype=torch.float64), PLAIN)
    assert logprobs.isnan().all()


def test_half_precision_logits_are_read_in_float32():
    logits = torch.randn(4, 300).bfloat16()
    uniforms = request_uniforms(0, 4, 1)[:, 0]
    from_half, from_single = (
        draw_tokens(logits, uniforms, PLAIN),
        draw_tokens(logits.float(), uniforms, PLAIN),
    )
    assert torch.equal(from_half[0], from_single[0])
    assert torch.equal(from_half[1], from_single[1])


def test_the_numbers_of_a_request_are_its_seeds():
    assert torch.equal(request_uniforms(5, 3, 4), request_uniforms(5, 3, 4))
    assert not torch.equal(request_uniforms(5, 3, 4), request_uniforms(6, 3, 4))
    torch.rand(7)  # the global state plays no part
    assert torch.equal(request_uniforms(5, 3, 4)[:2], request_uniforms(5, 2, 4))
