"""The policy as it was before the training, which a KL divergence is measured from."""

# B completions, L completion positions

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..moe.evaluating import evaluating
from ..moe.language_head import PROBE_TOKENS
from .batch import PolicyBatch
from .policy import Policy, check_precision, is_peft, policy_inputs


class Reference:
    """Log-probs under the policy as it is now, while the policy goes on to learn.

    With adapters that change nothing yet it is the same model without them, else a frozen copy of the model
    in memory; never a model of the same name, which would have all experts that a compressed one has lost.

    Attributes:
        policy: What is asked; the policy itself where adapters are left out.
        is_copy: Whether it is a copy.

    Args:
        policy: Before the training, and before anything wraps or divides it.
    """

    def __init__(self, policy: Policy) -> None:
        self.is_copy = not _has_idle_adapters(policy)
        self.policy: nn.Module = copy.deepcopy(policy).requires_grad_(False) if self.is_copy else policy
        self._without_adapters: Any = nullcontext if self.is_copy else policy.model.disable_adapter

    def logprobs(self, batch: PolicyBatch, *, temperature: float) -> Float[Tensor, "B L"]:
        """Of the completions' tokens.

        Args:
            batch: Where the policy is; a copy follows it.
            temperature: Of sampling.

        Raises:
            ValueError: What wraps the policy has rounded its log-probs.
        """
        if self.is_copy:
            self.policy.to(batch.completion_ids.device)
        inputs = policy_inputs(batch)
        with torch.no_grad(), self._without_adapters(), _in_evaluation(self.policy):
            said = self.policy(**inputs, temperature=temperature, with_entropies=False)
        check_precision(said)
        return said["logprobs"]


@contextmanager
def _in_evaluation(policy: nn.Module) -> Iterator[None]:
    was_training = policy.training
    policy.eval()
    try:
        yield
    finally:
        policy.train(was_training)


def _has_idle_adapters(policy: Policy) -> bool:
    """Whether there are adapters, and the model says the same without them, to the last bit."""
    model: Any = policy.model
    if not is_peft(model):
        return False
    plain = policy.plain
    ids_BS = (
        torch.arange(PROBE_TOKENS, device=plain.device)[None] % policy.config.get_text_config().vocab_size
    )
    with evaluating(plain):
        with_them = plain(input_ids=ids_BS).logits
        with model.disable_adapter():
            without = plain(input_ids=ids_BS).logits
    return torch.equal(with_them, without)
