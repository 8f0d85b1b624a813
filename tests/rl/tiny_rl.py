"""A policy of a few thousand weights, prompts of three words, and trainers of a few steps."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from moekit.rl import (
    ALGORITHMS,
    NamedReward,
    PolicySettings,
    PolicyTrainer,
    Prompt,
    RewardSet,
    make_prompts,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

END, PAD = 0, 1
WORDS = ("<end>", "<pad>", "<unk>", *"abcdefghijklmnopqrstuvwxyz", *map(str, range(11)))
LIKED = frozenset(WORDS.index(letter) for letter in "abcdefgh")
"""Tokens that rewards want."""
ENDS = (END, *(WORDS.index(letter) for letter in "wxyz"))
"""Many, so that completions differ in length."""
SETTINGS: dict[str, Any] = {
    "steps": 3,
    "prompts_per_step": 4,
    "num_generations": 4,
    "micro_batch_size": 8,
    "max_completion_length": 6,
    "learning_rate": 1e-2,
    "save_steps": 1,
}
METHODS: dict[str, dict[str, Any]] = {
    "hbpo": {"budgets": (0.34, 0.67), "budget_prefix": "{budget}"},
    "kl-cov": {"share": 0.1},
    "clip-cov": {"share": 0.1, "covariance_low": 0.01},
    "gtpo": {"tau": 4.0},
    "epo": {"entropy_weight": 0.1, "kappa_low": 0.9, "kappa_high": 1.1},
    "dph-rl": {"eta": 0.5},
}
"""Settings with which something happens on so few tokens."""
NEEDED: dict[str, dict[str, Any]] = {
    "kl-cov": {"mini_batches": 2},
    "rover": {"mini_batches": 2},
    "dph-rl": {"pass_at": 0.2, "rehearsal_generations": 2, "rehearsal_threshold": 0.5},
    "rl-plus": {"entropy_coef": 0.01},
}


class KilledError(BaseException):
    """What a reward set and a trainer cannot catch."""


def tiny_tokenizer(**special: Any) -> PreTrainedTokenizerFast:
    """A word is a token."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    given = {"eos_token": "<end>", "pad_token": "<pad>", "unk_token": "<unk>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **given)


def tiny_policy(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random Qwen3-MoE of two layers with four experts."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "intermediate_size": 16,
        "moe_intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32,
        "initializer_range": 0.3,
        "tie_word_embeddings": True,
        "eos_token_id": END,
        "pad_token_id": PAD,
    }
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**sizes, **changes}))
    model.generation_config.eos_token_id = list(ENDS)
    return model


def double_policy() -> PreTrainedModel:
    """Its weights in double precision, where the order of additions does not matter."""
    model = tiny_policy()
    model.set_experts_implementation("eager")  # the other one knows single precision only
    return model.double()


def tiny_rows(count: int = 12) -> list[dict[str, Any]]:
    """Prompts of one to three words, and a demonstration of each."""
    letters = WORDS[4:29]
    return [
        {
            "prompt": " ".join(letters[(row * step) % 25] for step in range(1, 2 + row % 3)),
            "demonstration": " ".join("a" * (1 + row % 4)),
        }
        for row in range(count)
    ]


def tiny_prompts(count: int = 12, **columns: Any) -> list[Prompt]:
    return make_prompts([row | columns for row in tiny_rows(count)], tiny_tokenizer())


def liked(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """Share of the tokens that are wanted."""
    return [sum(i in LIKED for i in ids) / len(ids) for ids in completion_ids]


def rewards_of(function: Callable[..., Any] = liked) -> RewardSet:
    return RewardSet([NamedReward(name="liked", function=function, timeout_seconds=float("inf"))])


def tiny_trainer(folder: Path, name: str = "grpo", **given: Any) -> PolicyTrainer:
    """A trainer of one algorithm.

    Args:
        folder: Of the run.
        name: Of the algorithm.
        given: ``model``, ``tokenizer``, ``rewards``, ``prompts``, ``method`` (settings of the algorithm) and
            what else `PolicyTrainer` takes by name; the rest are `PolicySettings`.
    """
    parts = {
        "model": tiny_policy,
        "tokenizer": tiny_tokenizer,
        "rewards": rewards_of,
        "prompts": tiny_prompts,
    }
    made = {part: given.pop(part) if part in given else make() for part, make in parts.items()}
    method = given.pop("method", METHODS.get(name, {}))
    known = PolicySettings.__dataclass_fields__
    own = {key: given.pop(key) for key in list(given) if key in known}
    return PolicyTrainer(
        made["model"],
        made["tokenizer"],
        ALGORITHMS[name].with_settings(**method),
        made["rewards"],
        made["prompts"],
        PolicySettings(**{**SETTINGS, **NEEDED.get(name, {}), **own}),
        folder=folder,
        **given,
    )


def weights(trainer: PolicyTrainer) -> dict[str, Tensor]:
    """Copies of all parameters."""
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def optimizer_state(trainer: PolicyTrainer) -> dict[str, Tensor]:
    """By number of the parameter and name."""
    found = trainer.learner.updater.optimizer.state_dict()["state"]
    return {f"{number}/{name}": value for number, part in found.items() for name, value in part.items()}


def gradients(trainer: PolicyTrainer) -> dict[str, Tensor]:
    """The first moments of AdamW, which after one update are a tenth of its gradient."""
    return {name: v for name, v in optimizer_state(trainer).items() if name.endswith("exp_avg")}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        message = f"{name}: {{}}".format
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=message)


def untimed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a history without what differs between runs that are the same."""
    return [
        {k: v for k, v in row.items() if not k.startswith("time/") and k != "completions_per_second"}
        for row in rows
    ]


@contextmanager
def killed() -> Iterator[None]:
    """Expects a kill."""
    try:
        yield
    except KilledError:
        return
    raise AssertionError("the run was not killed")
