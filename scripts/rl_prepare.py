"""Checks of `moekit rl` before any work, and what they find."""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..rl import ALGORITHMS, Algorithm, PolicySettings, Prompt, make_prompts
from ..rl.collect import Collector
from ..rl.optimizer import rate_function
from ..rl.rewards import RewardSet, load_reward
from .record import versions
from .rl_adapters import with_adapters
from .rl_checks import (
    check_device,
    check_prompts,
    check_rl_options,
    policy_generator,
    policy_skeleton,
    said_as_options,
)
from .rl_data import EVAL_SEED, apply_template, held_out, prompts_fingerprint, read_prompt_rows
from .rl_options import RlOptions
from .rl_presets import resolve
from .train_model import Source, load_processor, open_training_source

NOT_SETTINGS = ("out", "debug", "resume", "logging_steps", "report_to", "device")


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
    check_rl_options(options, replace=replace)
    check_device(options.device, accelerator.device)
    algorithm = _algorithm(options)
    with said_as_options():
        settings = _settings(options, algorithm)
        settings.check(algorithm, accelerator.num_processes)
        rate_function(settings)
    rewards = _rewards(options, settings.max_completion_length)
    rows, held = _rows(options)
    source = open_training_source(options.model, allow_compressed=True)
    skeleton = policy_skeleton(source, options)
    tokenizer = load_processor(options.tokenizer, source, "causal-lm")
    prompts, eval_prompts = (
        make_prompts(part, tokenizer, max_length=options.max_prompt_length) if part else []
        for part in (rows, held)
    )
    collector = Collector(
        generator=policy_generator(skeleton, source, tokenizer),
        rewards=rewards,
        tokenizer=tokenizer,
        algorithm=algorithm,
        num_generations=settings.num_generations,
        max_completion_length=settings.max_completion_length,
        seed=settings.seed,
    )
    with said_as_options():
        check_prompts([*prompts, *eval_prompts], skeleton, settings)
        collector.check(prompts)
        _plain(collector).check(eval_prompts or prompts)
    with_adapters(skeleton, options)
    return RlJob(
        options=options,
        source=source,
        processor=tokenizer,
        algorithm=algorithm,
        settings=settings,
        rewards=rewards,
        prompts=prompts,
        eval_prompts=eval_prompts,
        fingerprint=_fingerprint(options, source, prompts, eval_prompts, accelerator.num_processes),
        accelerator=accelerator,
    )


def _plain(collector: Collector) -> Collector:
    """What held-out prompts are completed by, whatever the method asks for in training."""
    plain = dataclasses.replace(collector.algorithm, shaper=None)
    return dataclasses.replace(collector, algorithm=plain)


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


def _fingerprint(
    options: RlOptions,
    source: Source,
    prompts: list[Prompt],
    eval_prompts: list[Prompt],
    processes: int,
) -> dict[str, Any]:
    given = {key: value for key, value in vars(options).items() if key not in NOT_SETTINGS}
    more = {
        "model files": source.fingerprint,
        "prompts": prompts_fingerprint(prompts),
        "held-out prompts": prompts_fingerprint(eval_prompts),
        "reward files": [_reward_file(name) for name in options.reward if ":" in name],
        "processes": processes,
        "versions": versions(),
    }
    return json.loads(json.dumps(given | more, default=str))


def _reward_file(name: str) -> str | None:
    """Changes when the user's own reward does, as far as it stands in its own file."""
    place = name.rpartition(":")[0]
    file = place if place.endswith(".py") else getattr(sys.modules[place], "__file__", None)
    return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()
