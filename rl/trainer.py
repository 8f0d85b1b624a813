"""The loop: prompts -> rollouts -> rewards -> advantages -> loss -> step."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from ..moe.router_replay import check_replay
from . import checkpoint
from .algorithm import Algorithm
from .checkpoint import RunState
from .collect import Collector
from .evaluation import evaluate
from .finite import check_weights
from .generation.embedded import EmbeddedGenerator
from .generation.generator import Generator
from .history import History
from .learner import Learner
from .optimizer import make_optimizer, rate_function
from .passes import PolicyPasses
from .policy import Policy, without_dropout
from .processes import check_processes, prepare_deepspeed
from .prompts import check_context
from .reference import Reference
from .rehearsal import Rehearsal, build_rehearsal
from .rehearsal_file import read_rehearsal, rehearsal_origin, write_rehearsal
from .rewards.reward_set import RewardSet
from .rollout import Prompt
from .rollouts import RolloutSampler, StepRollouts
from .run_log import RunLog
from .settings import PolicySettings
from .special_tokens import end_and_pad
from .step_metrics import add_rollout_metrics, finish_covariance
from .stopwatch import Stopwatch
from .sums import Sums
from .updates import PolicyUpdater
from .whole_weights import whole_weights

REHEARSAL_FILE = "rehearsal.safetensors"


class PolicyTrainer:
    """Trains a causal language model, a compressed one above all, with one of `ALGORITHMS`.

    What a run does at a step depends on its seed and its weights alone, so a run that was killed and goes on
    ends where it would have ended.

    Attributes:
        state: Where the run stands.
        policy: As accelerate wraps it.
        model: The policy itself.
        log: History and completions.

    Args:
        model: The policy; changed in place. With PEFT adapters, these alone are trained.
        tokenizer: Its tokenizer.
        algorithm: A row of `ALGORITHMS`, perhaps `Algorithm.with_settings`.
        rewards: What completions earn; the first function decides what passes.
        prompts: To train on.
        settings: How.
        folder: Of checkpoints and history; a run that finds its own there goes on.
        eval_prompts: Held out.
        generator: Writes completions; by default the model itself does.
        accelerator: By default a new one.
        on_row: Told of every logged step, on the main process.

    Raises:
        ValueError: Settings, data, tokenizer and method do not fit each other.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        algorithm: Algorithm,
        rewards: RewardSet,
        prompts: Sequence[Prompt],
        settings: PolicySettings,
        *,
        folder: Path,
        eval_prompts: Sequence[Prompt] = (),
        generator: Generator | None = None,
        accelerator: Accelerator | None = None,
        on_row: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.accelerator = accelerator = Accelerator() if accelerator is None else accelerator
        check_processes(accelerator)
        settings.check(algorithm, accelerator.num_processes)
        self.model, self.algorithm, self.settings, self.folder = model, algorithm, settings, folder
        self.eval_prompts = eval_prompts
        eos_ids, pad_id = end_and_pad(model, tokenizer)
        without_dropout(model)
        bare = Policy(
            model,
            with_router_loss=settings.router_aux_loss_coef > 0,
            share_prompts=not settings.router_replay,  # which knows choices by rows of their own
        )
        if generator is None:
            generator = EmbeddedGenerator(
                bare.plain, eos_token_ids=eos_ids, pad_token_id=pad_id, tokenizer=tokenizer
            )
        collector = Collector(
            generator=generator,
            rewards=rewards,
            tokenizer=tokenizer,
            algorithm=algorithm,
            num_generations=settings.num_generations,
            max_completion_length=settings.max_completion_length,
            seed=settings.seed,
            whole_weights=self._generating,
        )
        self.rollouts = RolloutSampler(
            accelerator=accelerator, collector=collector, prompts=prompts, settings=settings, pad_id=pad_id
        )
        self._check(bare)
        self.learner = self._learner(bare)
        self.state = RunState()
        self.log = RunLog(
            folder=folder,
            steps=settings.steps,
            logging_steps=settings.logging_steps,
            is_main=accelerator.is_main_process,
            on_row=on_row,
        )

    def _learner(self, bare: Policy) -> Learner:
        accelerator, algorithm, settings = self.accelerator, self.algorithm, self.settings
        rate = rate_function(settings)
        needs_reference = settings.beta > 0 or "reference" in algorithm.needs
        reference = Reference(bare) if needs_reference else None
        prepare_deepspeed(accelerator, settings)
        self.policy, optimizer = accelerator.prepare(bare, make_optimizer(bare, settings))
        self.policy.train()
        shared: dict[str, Any] = {"accelerator": accelerator, "algorithm": algorithm, "settings": settings}
        passes = PolicyPasses(policy=self.policy, plain=bare, reference=reference, **shared)
        updater = PolicyUpdater(passes=passes, optimizer=optimizer, rate=rate, **shared)
        return Learner(passes=passes, updater=updater, **shared)

    @property
    def history(self) -> History:
        """Metrics of every step."""
        return self.log.history

    @property
    def completions(self) -> History:
        """Some completions of every logged step."""
        return self.log.completions

    def _check(self, bare: Policy) -> None:
        """What can be known of data and model before anything is sampled."""
        settings, prompts = self.settings, self.rollouts.prompts
        if not prompts:
            raise ValueError("there are no prompts to train on")
        if settings.router_replay:
            if not bare.layers:
                raise ValueError(f"router_replay: {type(bare.plain).__name__} has no experts to replay")
            check_replay(bare.layers)
        context = getattr(bare.config.get_text_config(), "max_position_embeddings", None)
        check_context([*prompts, *self.eval_prompts], context, settings.max_completion_length)
        self.rollouts.collector.check(prompts)
        if self.eval_prompts:
            self._eval_collector.check(self.eval_prompts)

    @contextmanager
    def _generating(self) -> Iterator[None]:
        """Whole weights, and the precision of the training: who samples is who learns."""
        with whole_weights(self.accelerator, self.policy), self.accelerator.autocast():
            yield

    def train(self) -> RunState:
        """Train to the end, from the last checkpoint if there is one.

        Returns:
            The final state.

        Raises:
            NonFiniteError: Gradient or weights became NaN or infinite; the last checkpoint is sound.
            ValueError: The last checkpoint cannot be read.
        """
        is_new = not self._resume()
        if "rehearsal" in self.algorithm.needs:
            self.rollouts.rehearsal = self._rehearsal()
        if is_new and self.eval_prompts:
            self.log.row({"step": 0} | self._evaluation())
        while self.state.step < self.settings.steps:
            row = self._step()
            step = self.state.step
            is_last = step == self.settings.steps
            is_measured = self.settings.eval_steps and step % self.settings.eval_steps == 0
            if self.eval_prompts and (is_last or is_measured):
                row |= self._evaluation()
                row["reward_failures"] = sum(self.state.failures.values())
            self.log.row(row)
            if is_last or step % self.settings.save_steps == 0:
                self.save()
        return self.state

    def save(self) -> None:
        """Write a checkpoint; every process calls it.

        Raises:
            NonFiniteError: Weights hold NaN or infinity.
        """
        check_weights(self.accelerator, self.policy)
        checkpoint.save(self.folder, self.accelerator, self.state)

    def _resume(self) -> bool:
        """Whether the run goes on from somewhere."""
        if (found := checkpoint.load(self.folder, self.accelerator)) is not None:
            self.state = found
        is_begun = found is not None or self.state.step > 0
        self.log.go_on_from(self.state.step if is_begun else None)
        self.accelerator.wait_for_everyone()
        return is_begun

    def _step(self) -> dict[str, Any]:
        """One rollout step; gives its metrics."""
        state, sums, watch = self.state, Sums(), Stopwatch()
        rollouts = self.rollouts.sample(state)
        watch.lap("rollouts")
        batch = self.rollouts.batch(rollouts, state)
        add_rollout_metrics(sums, batch)
        self.learner.learn(batch, state, sums, watch)
        state.step += 1
        self._count_failures()
        self.log.keep(state.step, rollouts.groups[0])
        return self._row(rollouts, sums, watch)

    def _row(self, rollouts: StepRollouts, sums: Sums, watch: Stopwatch) -> dict[str, Any]:
        """What is known of a finished step."""
        state, told = self.state, self.rollouts.collector.told
        for name, (total, count) in told.items():
            sums.add(name, torch.tensor(total), count)
        told.clear()
        row: dict[str, Any] = {"step": state.step, "updates": state.updates, "skipped_steps": state.skipped}
        row |= finish_covariance(sums.means(self.accelerator))
        row |= self.learner.passes.take_expert_metrics()
        row["learning_rate"] = self.learner.updater.rate(max(0, state.updates - 1))
        row["reward_failures"] = sum(state.failures.values())
        if self.algorithm.drops_uninformative:
            row["sampling/rounds"] = rollouts.num_rounds
        row |= {f"time/{name}": seconds for name, seconds in watch.laps.items()}
        sampled = rollouts.num_rounds * self.settings.completions_per_step
        return row | {"completions_per_second": sampled / watch.total}

    def _count_failures(self) -> None:
        """Those of all processes, since the last call."""
        failures = self.rollouts.collector.failures
        for part in gather_object([dict(failures)]):
            for name, count in part.items():
                self.state.failures[name] = self.state.failures.get(name, 0) + count
        failures.clear()

    @property
    def _eval_collector(self) -> Collector:
        """Of plain completions, whatever the method asks for in training."""
        return replace(
            self.rollouts.collector,
            algorithm=replace(self.algorithm, shaper=None),
            num_generations=self.settings.eval_generations if self.settings.eval_temperature else 1,
            told={},
        )

    def _evaluation(self) -> dict[str, float]:
        """Metrics on held-out prompts, under names that begin with ``eval_``."""
        settings, temperature = self.settings, self.settings.eval_temperature
        sampling = replace(settings.sampling, temperature=temperature or 1.0, greedy=temperature == 0)
        found = evaluate(
            self._eval_collector,
            self.eval_prompts,
            sampling,
            self.accelerator,
            pass_at=settings.pass_at,
            step=self.state.step,
        )
        self._count_failures()
        return {f"eval_{name}": value for name, value in found.items()}

    def _rehearsal(self) -> Rehearsal:
        """Found before the first step, and kept for a run that goes on."""
        path, prompts, settings = self.folder / REHEARSAL_FILE, self.rollouts.prompts, self.settings
        origin = rehearsal_origin(prompts, settings)
        found = read_rehearsal(path, origin)
        if found is None:
            if self.state.step:
                raise ValueError(f"'{path}' is gone, and the policy is no longer what it was; begin anew")
            collector, logprobs_of = self.rollouts.collector, self.learner.passes.own_logprobs
            found = build_rehearsal(collector, prompts, settings, self.accelerator, logprobs_of)
            if self.accelerator.is_main_process:
                write_rehearsal(path, found, origin)
        self.accelerator.wait_for_everyone()
        return found

    def state_dict(self) -> dict[str, Any]:
        """The model's, whole, on the main process; every process calls it."""
        found: Any = self.accelerator.get_state_dict(self.policy) or {}  # None from ZeRO-3 on the others
        prefix = "model."  # `Policy.model`
        return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
