"""From logits to tokens: truncation of the distribution, and drawing by its inverse.

A token is drawn as the first one whose cumulative probability exceeds a uniform number that was fixed before
the generation began. So it depends on nothing but that number and the logits: not on what else is in
the batch, not on a device's random state.
"""

# R rows, V vocabulary, N new tokens, G samples of a request

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .settings import SamplingSettings


def request_uniforms(seed: int, num_samples: int, max_new_tokens: int) -> Float[Tensor, "G N"]:
    """All random numbers of a request, in [0, 1): one for each token of each sample.

    They come from a generator on the CPU and in float64, so that tokens rarer than 2^-24 can be drawn too.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((num_samples, max_new_tokens), generator=generator, dtype=torch.float64)


def truncate(logits: Float[Tensor, "R V"], settings: SamplingSettings) -> Float[Tensor, "R V"]:
    """Set the logits of tokens that may not be drawn to -inf: top-k, then top-p, then min-p.

    The order, the handling of ties in top-k and the token that always stays are those of `transformers`.

    Args:
        logits: Divided by the temperature already.
        settings: What stays.
    """
    if 0 < settings.top_k < logits.shape[-1]:
        lowest_R1 = logits.topk(settings.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < lowest_R1, -torch.inf)
    if settings.top_p < 1:
        ascending_RV, order_RV = logits.sort(dim=-1)
        removed_RV = ascending_RV.softmax(-1).cumsum_(-1) <= 1 - settings.top_p
        removed_RV[:, -1] = False
        logits = logits.masked_fill(removed_RV.scatter(1, order_RV, removed_RV), -torch.inf)
    if settings.min_p > 0:
        probs_RV = logits.softmax(-1)
        lowest_R1 = settings.min_p * probs_RV.amax(-1, keepdim=True)
        logits = logits.masked_fill(probs_RV < lowest_R1, -torch.inf)
    return logits


def draw_tokens(
    logits: Float[Tensor, "R V"], uniforms: Float[Tensor, " R"], settings: SamplingSettings
) -> tuple[Int[Tensor, " R"], Float[Tensor, " R"]]:
    """Draw a token for each row, or take the most probable one.

    A token of probability 0 is never drawn: the search finds the first cumulative sum *above* the number, and
    a token without weight does not raise it.

    Args:
        logits: As the model returns them, any floating dtype.
        uniforms: In [0, 1), one for each row, float64.
        settings: Temperature and truncation.

    Returns:
        Tokens, and their log-probs in float32: log-softmax(logits / temperature) over the whole vocabulary,
        before the truncation. A log-prob is NaN where the logits are not usable (NaN, +inf, or nothing
        finite); such a row's token means nothing.
    """
    logits = logits.float()
    if settings.temperature != 1:
        logits = logits / settings.temperature
    peak_R1 = logits.amax(-1, keepdim=True)
    # exp(logits - peak) serves the normaliser and the draw; a log-softmax would be two more passes.
    weights_RV = (logits - peak_R1).exp_()
    if settings.greedy:
        tokens_R1 = logits.argmax(-1, keepdim=True)
        total_R1 = weights_RV.sum(-1, keepdim=True)
    elif settings.truncates:
        total_R1 = weights_RV.sum(-1, keepdim=True)
        allowed_RV = truncate(logits, settings) != -torch.inf
        tokens_R1, _ = _search(weights_RV.mul_(allowed_RV), uniforms)
    else:
        tokens_R1, total_R1 = _search(weights_RV, uniforms)
    logprobs_R1 = logits.gather(1, tokens_R1) - peak_R1 - total_R1.log()
    return tokens_R1.squeeze(1), logprobs_R1.squeeze(1).float()


def _search(
    weights_RV: Float[Tensor, "R V"], uniforms_R: Float[Tensor, " R"]
) -> tuple[Int[Tensor, "R 1"], Float[Tensor, "R 1"]]:
    cumulative_RV = weights_RV.cumsum(-1, dtype=torch.float64)
    total_R1 = cumulative_RV[:, -1:]
    tokens_R1 = torch.searchsorted(cumulative_RV, uniforms_R.unsqueeze(1) * total_R1, right=True)
    # NaN weights are reported at the end of the generation; until then their token must exist.
    return tokens_R1.clamp_(max=weights_RV.shape[-1] - 1), total_R1
