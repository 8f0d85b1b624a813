"""RL-PLUS: a demonstration joins each group, weighted by multiple importance sampling."""

import math
from typing import Any

import torch

from ..algorithm import MethodContext, TokenLoss, TokenStatistics
from ..batch import PolicyBatch
from ..rollout import Prompt, Request
from ..surrogate import MAX_LOG_RATIO, log_ratios


def shaper(
    prompt: Prompt,
    num_generations: int,
    tokenizer: Any,
    max_completion_length: int,
    *,
    demonstration_column: str = "demonstration",
) -> list[Request]:
    """G - 1 samples, and the row's demonstration with an end token.

    Args:
        prompt: Whose columns hold the demonstration.
        num_generations: G.
        tokenizer: Of the policy.
        max_completion_length: Not read; who adds it cuts it.
        demonstration_column: A string in each row.

    Raises:
        ValueError: The row has no demonstration, or the tokenizer no end token.
    """
    text = prompt.columns.get(demonstration_column)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(
            f"row {prompt.index + 1} has {demonstration_column}={text!r}; RL-PLUS needs a text that answers "
            "the prompt in this column of every row (setting demonstration_column)"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end token, with which a demonstration has to end")
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    if ids[-1:] != (tokenizer.eos_token_id,):
        ids = (*ids, tokenizer.eos_token_id)
    return [Request(num_samples=num_generations - 1, demonstration_ids=ids)]


def policy_loss(
    now: TokenStatistics,
    batch: PolicyBatch,
    context: MethodContext,
    *,
    gamma: float = 0.5,
    behaviour_probability: float = 1.0,
) -> TokenLoss:
    """Samples: ``-A r``. Demonstrations: ``-A (1 - sg[pi_theta])^gamma 2 pi_theta / (1.5 pi_old + U / 2)``.

    Args:
        now: Of the policy in training.
        batch: With demonstrations among the completions.
        context: Not read.
        gamma: Attention to tokens that the policy finds unlikely.
        behaviour_probability: U, what is assumed of the unknown author; the paper's is 1 / vocabulary size.

    *Departs from the paper*: U = 1 (rare tokens weigh several times less) and no division by the standard
    deviation, as in the released code. Reference: Dong et al., RL-PLUS (ACL 2026), arXiv:2508.00222.
    """
    if not 0 <= behaviour_probability <= 1:
        raise ValueError(f"behaviour_probability={behaviour_probability} must be between 0 and 1")
    log_ratios_BL, advantages_BL = log_ratios(now, batch), batch.required("advantages")
    mask_BL = batch.external_mask & batch.policy_mask
    logprobs_BL = torch.where(mask_BL, now.logprobs, 0.0)
    old_BL = torch.where(mask_BL, batch.required("old_logprobs"), 0.0)
    uniform_BL = torch.full_like(old_BL, behaviour_probability / 2).log()
    mixed_BL = logprobs_BL + math.log(2) - torch.logaddexp(old_BL + math.log(1.5), uniform_BL)
    weights_BL = mixed_BL.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    explored_BL = (-logprobs_BL.detach().expm1()).clamp_min(0) ** gamma
    ratios_BL = torch.where(mask_BL, weights_BL * explored_BL, log_ratios_BL.exp())
    metrics = {"ratio": ratios_BL.detach(), "external": mask_BL.to(ratios_BL.dtype)}
    return TokenLoss(values=-advantages_BL * ratios_BL, metrics=metrics)
