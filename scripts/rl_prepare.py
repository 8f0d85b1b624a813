"""Checks of `moekit rl` before any work, and what they find."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from ..rl import ALGORITHMS, Algorithm, PolicySettings, Prompt, make_prompts
from ..rl.rewards import RewardSet, load_reward
from .calibrate import context_length
from .options import flag
from .prepare import SIZE, check_machine, check_names
from .record import versions
from .rl_data import EVAL_SEED, apply_template, held_out, read_prompt_rows, rows_fingerprint
from .rl_options import RlOptions
from .rl_presets import resolve
from .staging import check_output
from .train_model import Source, load_processor, open_training_source, training_skeleton

NOT_SETTINGS = ("out", "debug", "resume", "logging_steps", "report_to", "device")
DEFAULT_ALPHA = 2.0


@dataclass(frozen=True, kw_only=True)
class RlJob:
    """Options that passed every check, and what they name."""

    options: RlOptions
    source: Source
    processor: Any
    """The tokenizer."""
    algorithm: Algorithm
    settings: PolicySettings
    rewards: RewardSet
    prompts: list[Prompt]
    eval_prompts: list[Prompt]
    fingerprint: Mapping[str, Any]
    """What the result depends on, as JSON values."""
    accelerator: Accelerator
    start: str = "trained"
    """What the policy begins with; for the model card."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes and speaks."""
        return self.accelerator.is_main_process


def prepare_rl(options: RlOptions, accelerator: Accelerator, *, replace: bool = False) -> RlJob:
    """Check everything that can be checked before the weights are read.

    Args:
        options: What to do.
        accelerator: Of the processes.
        replace: The output folder may hold something.

    Raises:
        ValueError: What cannot be, with the fix.
    """
    _check_options(options, replace=replace)
    algorithm = _algorithm(options)
    settings = _settings(options, algorithm)
    settings.check(algorithm, accelerator.num_processes)
    rewards = _rewards(options, settings.max_completion_length)
    rows, held = _rows(options)
    rewards.check_columns(list(rows[0]))
    source = open_training_source(options.model, allow_compressed=True)
    if not source.has_weights:
        raise ValueError(f"'{options.model}' has no weights; a policy must be a trained language model")
    tokenizer = load_processor(options.tokenizer, source, "causal-lm")
    training_skeleton(source.config, "causal-lm", source.name)
    prompts = make_prompts(rows, tokenizer, max_length=options.max_prompt_length)
    eval_prompts = make_prompts(held, tokenizer, max_length=options.max_prompt_length) if held else []
    _check_context(settings, source, [*prompts, *eval_prompts])
    return RlJob(
        options=options,
        source=source,
        processor=tokenizer,
        algorithm=algorithm,
        settings=settings,
        rewards=rewards,
        prompts=prompts,
        eval_prompts=eval_prompts,
        fingerprint=_fingerprint(options, source, rows, held, accelerator.num_processes),
        accelerator=accelerator,
    )


def _check_options(options: RlOptions, *, replace: bool) -> None:
    check_names(options.model, options.data)
    if options.data is None:
        raise ValueError("--data is missing: name the prompts (see `moekit rl --help`)")
    if options.out is None:
        raise ValueError("--out is missing: name the folder to make")
    check_output(options.out.expanduser(), replace=replace)
    size = SIZE.fullmatch(options.max_shard_size)
    if size is None or float(size[1]) == 0:
        raise ValueError(f"--max-shard-size {options.max_shard_size!r} is not a size such as 500MB or 5GB")
    check_machine(options.device, options.seed)
    for name in ("lora", "max_prompt_length"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{flag(name)} {value} is not a positive number")
    if options.lora is None and (options.lora_targets or options.lora_alpha is not None):
        raise ValueError("--lora-alpha and --lora-targets need --lora, the rank")


def _algorithm(options: RlOptions) -> Algorithm:
    changes: dict[str, Any] = {}
    for text in options.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text!r} is not NAME=VALUE")
        try:
            changes[name.replace("-", "_")] = json.loads(value)
        except ValueError:
            changes[name.replace("-", "_")] = value
    return ALGORITHMS[options.algorithm].with_settings(**changes)


def _settings(options: RlOptions, algorithm: Algorithm) -> PolicySettings:
    known = PolicySettings.__dataclass_fields__
    given = {name: value for name, value in vars(options).items() if name in known}
    stop = tuple(text.replace("\\n", "\n") for text in options.stop)
    return PolicySettings(**{**given, **resolve(algorithm, options.preset, given), "stop": stop})


def _rewards(options: RlOptions, max_completion_length: int) -> RewardSet:
    weights = options.reward_weights or (1.0,) * len(options.reward)
    if not options.reward:
        raise ValueError("--reward names nothing; name at least one reward")
    if len(weights) != len(options.reward):
        raise ValueError(
            f"--reward-weights gives {len(weights)} weights for {len(options.reward)} rewards; give one each"
        )
    found = [
        load_reward(name, weight=float(weight), max_completion_length=max_completion_length)
        for name, weight in zip(options.reward, weights, strict=True)
    ]
    return RewardSet(found, timeout_seconds=options.reward_timeout)


def _rows(options: RlOptions) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """To train on, and held out."""
    rows = apply_template(read_prompt_rows(str(options.data), seed=options.seed), options.prompt_template)
    if options.eval_prompts < 1:
        return rows, []
    if options.eval_data is None:
        return held_out(rows, options.eval_prompts, options.seed)
    held = read_prompt_rows(options.eval_data, seed=options.seed + EVAL_SEED)
    return rows, apply_template(held[: options.eval_prompts], options.prompt_template)


def _check_context(settings: PolicySettings, source: Source, prompts: list[Prompt]) -> None:
    longest = max(len(prompt.ids) for prompt in prompts)
    context = context_length(source.config)
    if context is not None and longest + settings.max_completion_length > context:
        raise ValueError(
            f"the longest prompt ({longest} tokens) and --max-completion-length "
            f"{settings.max_completion_length} do not fit the policy's context of {context} tokens; take "
            f"at most {context - longest}, or shorter prompts"
        )


def _fingerprint(
    options: RlOptions,
    source: Source,
    rows: list[dict[str, Any]],
    held: list[dict[str, Any]],
    processes: int,
) -> dict[str, Any]:
    given = {key: value for key, value in vars(options).items() if key not in NOT_SETTINGS}
    more = {
        "model files": source.fingerprint,
        "prompts": rows_fingerprint(rows),
        "held-out prompts": rows_fingerprint(held),
        "processes": processes,
        "versions": versions(),
    }
    return json.loads(json.dumps(given | more, default=str))
