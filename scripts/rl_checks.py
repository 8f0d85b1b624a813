"""What `moekit rl` refuses before it reads weights: options, trackers, policies that cannot continue text."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from math import isfinite
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, GenerationConfig, PreTrainedModel

from ..moe.discovery import has_experts
from ..rl import EmbeddedGenerator, PolicySettings, Prompt
from ..rl.prompts import check_context
from ..rl.special_tokens import end_and_pad
from .load import find_device
from .options import flag
from .prepare import check_machine, check_names, check_shard_size
from .rl_options import RlOptions
from .staging import check_output
from .train_model import Source, training_skeleton
from .training_checks import check_positive

HEAD = re.compile(r"For(?!CausalLM$|ConditionalGeneration$)[A-Z]\w*$")
"""Ends the names of classes with a head for something else than the next token."""
NAMES = [field.name for field in fields(RlOptions)]
SETTING = re.compile(rf"\b({'|'.join(name for name in NAMES if '_' in name)})\b(=?)|\b({'|'.join(NAMES)})(=)")
"""An option as the library names it: with its value, or where its name is no word of English."""


@contextmanager
def said_as_options() -> Iterator[None]:
    """Let errors of the library name options as the command line does."""
    try:
        yield
    except ValueError as error:
        raise ValueError(as_options(str(error))) from error


def as_options(text: str) -> str:
    """``num_generations=1`` becomes ``--num-generations 1``."""
    return SETTING.sub(lambda m: flag(m[1] or m[3]) + (" " if m[2] or m[4] else ""), text)


def check_rl_options(options: RlOptions, *, replace: bool) -> None:
    """Refuse what the options alone show cannot be, `PolicySettings` apart.

    Args:
        options: What to do.
        replace: The output folder may hold something.

    Raises:
        ValueError: Names the option.
    """
    check_names(options.model, options.data)
    if options.data is None:
        raise ValueError("--data is missing: name the prompts (see `moekit rl --help`)")
    if options.out is None:
        raise ValueError("--out is missing: name the folder to make")
    check_output(options.out.expanduser(), replace=replace)
    check_shard_size(options.max_shard_size)
    check_machine(options.device, options.seed)
    check_positive(options, ("lora", "lora_alpha", "max_prompt_length", "reward_timeout"))
    if not isfinite(options.pass_at):
        raise ValueError(f"--pass-at {options.pass_at} is not a finite number")
    if options.eval_prompts < 0:
        raise ValueError(f"--eval-prompts {options.eval_prompts} is not a number of at least 0")
    if options.eval_prompts == 0 and options.eval_data is not None:
        raise ValueError("--eval-prompts 0 reads nothing of --eval-data; leave out either")
    if options.lora is None and (options.lora_targets or options.lora_alpha is not None):
        raise ValueError("--lora-alpha and --lora-targets need --lora, the rank")


def check_trackers(names: tuple[str, ...]) -> None:
    """Refuse trackers that are not installed, which accelerate would leave out in silence.

    Raises:
        ValueError: Names those that there are.
    """
    there = sorted(str(LoggerType(name)) for name in get_available_trackers())
    if missing := sorted({*names} - {*there}):
        raise ValueError(
            f"--report-to {missing[0]} is not installed or not known to accelerate; there are: "
            f"{', '.join(there) or 'none'}"
        )


def check_device(name: str | None, found: torch.device) -> None:
    """Refuse a device that accelerate has not taken.

    Args:
        name: What the user asked for.
        found: What accelerate has taken.

    Raises:
        ValueError: Says how to choose it.
    """
    asked = None if name is None else find_device(name)
    if asked is not None and (asked.type != found.type or asked.index not in (None, found.index)):
        raise ValueError(
            f"--device {name} cannot be: accelerate trains on {found}; give --device cpu, or choose one with "
            "CUDA_VISIBLE_DEVICES"
        )


def policy_skeleton(source: Source, options: RlOptions) -> PreTrainedModel:
    """The policy without its weights, if it can be one.

    Raises:
        ValueError: It has no weights, does not continue text, or lacks what is asked of it.
    """
    if not source.has_weights:
        raise ValueError(f"'{source.name}' has no weights; a policy must be a trained language model")
    _check_kind(source)
    skeleton = training_skeleton(source.config, "causal-lm", source.name)
    if options.gradient_checkpointing and not skeleton.supports_gradient_checkpointing:
        raise ValueError(
            f"--gradient-checkpointing is nothing that {type(skeleton).__name__} can do; leave it out"
        )
    for name in ("router_replay", "router_aux_loss_coef"):
        if getattr(options, name) and not has_experts(skeleton):
            raise ValueError(f"{flag(name)} is for policies with experts, and '{source.name}' has none")
    return skeleton


def _check_kind(source: Source) -> None:
    """Refuse encoders, encoder-decoders and classifiers, some of which would load as language models."""
    config, advice = source.config, "name a causal language model"
    classes = getattr(config, "architectures", None) or []
    if other := next((kind for kind in classes if HEAD.search(kind)), None):
        raise ValueError(f"'{source.name}' is a {other}, which does not continue text; {advice}")
    if config.is_encoder_decoder:
        raise ValueError(f"'{source.name}' is an encoder-decoder ({config.model_type}); {advice}")
    is_encoder = type(config) in AutoModelForMaskedLM._model_mapping and not getattr(
        config, "is_decoder", False
    )
    if is_encoder or type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"'{source.name}' is of model type {config.model_type!r}, which does not continue text; {advice}"
        )


def policy_generator(skeleton: PreTrainedModel, source: Source, tokenizer: Any) -> EmbeddedGenerator:
    """What will write the completions, with the weights still missing.

    Raises:
        ValueError: The policy keeps no cache, or no token could end a completion.
    """
    try:
        generation: Any = GenerationConfig.from_pretrained(source.folder)
    except OSError:
        generation = None
    ends, pad = end_and_pad(SimpleNamespace(config=skeleton.config, generation_config=generation), tokenizer)
    return EmbeddedGenerator(skeleton, eos_token_ids=ends, pad_token_id=pad, tokenizer=tokenizer)


def check_prompts(prompts: list[Prompt], skeleton: PreTrainedModel, settings: PolicySettings) -> None:
    """Refuse prompts that the policy cannot read.

    Raises:
        ValueError: Tokens beyond its vocabulary, or too many of them.
    """
    config: Any = skeleton.config.get_text_config()
    largest = max(max(prompt.ids) for prompt in prompts)
    if largest >= config.vocab_size:
        raise ValueError(
            f"the tokenizer turns a prompt into token id {largest}, and the policy's vocabulary has "
            f"{config.vocab_size} tokens; name the policy's own tokenizer with --tokenizer"
        )
    check_context(prompts, getattr(config, "max_position_embeddings", None), settings.max_completion_length)
