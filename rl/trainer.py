"""The loop: prompts -> rollouts -> rewards -> advantages -> loss -> step."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedModel

from . import checkpoint
from .algorithm import Algorithm, MethodContext
from .batch import PolicyBatch, policy_batch
from .checkpoint import RunState
from .collect import Collector
from .evaluation import evaluate
from .generation.embedded import EmbeddedGenerator
from .generation.generator import Generator
from .generation.settings import SamplingSettings
from .history import History
from .optimizer import make_optimizer, rate_function
from .policy import Policy, statistics_of, without_dropout
from .processes import check_processes, prepare_deepspeed
from .prompts import draw_order
from .reference import Reference
from .rehearsal import Rehearsal, build_rehearsal, read_rehearsal, write_rehearsal
from .rewards.reward_set import RewardSet
from .rollout import Prompt, RolloutGroup
from .settings import PolicySettings
from .special_tokens import end_and_pad
from .step_metrics import add_rollout_metrics, finish_covariance
from .sums import Sums
from .updates import PolicyUpdater
from .whole_weights import whole_weights

REHEARSAL_FILE = "rehearsal.json"
SHOWN = 4
"""Completions of a step that are kept to be read."""
REHEARSAL_GROUP = 2**24
"""Group numbers of rehearsal samples begin here."""


class PolicyTrainer:
    """Trains a causal language model, a compressed one above all, with one of `ALGORITHMS`.

    What a run does at a step depends on its seed and its weights alone, so a run that was killed and goes on ends
    where it would have ended.

    Attributes:
        state: Where the run stands.
        policy: As accelerate wraps it.
        model: The policy itself.
        history: Metrics of every step.
        completions: Some completions of every logged step.

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
        on_row: Called with the metrics of each logged step, on the main process.

    Raises:
        ValueError: Settings, data, tokenizer and method do not fit each other.
    """

    def __init__(
        self,
        model: PreTrainedModel,
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
        if not prompts:
            raise ValueError("there are no prompts to train on")
        self.algorithm, self.settings, self.folder = algorithm, settings, folder
        self.prompts, self.eval_prompts, self.on_row = prompts, eval_prompts, on_row
        eos_ids, self.pad_id = end_and_pad(model, tokenizer)
        without_dropout(model)
        self.model = model
        bare = Policy(model, with_router_loss=settings.router_aux_loss_coef > 0)
        needs_reference = settings.beta > 0 or "reference" in algorithm.needs
        self.reference = Reference(bare) if needs_reference else None
        prepare_deepspeed(accelerator, settings)
        self.policy, self.optimizer = accelerator.prepare(bare, make_optimizer(bare, settings))
        self.policy.train()
        self.state = RunState()
        self.history = History(folder / "history.jsonl")
        self.completions = History(folder / "completions.jsonl")
        if generator is None:
            generator = EmbeddedGenerator(
                model, eos_token_ids=eos_ids, pad_token_id=self.pad_id, tokenizer=tokenizer
            )
        self.collector = Collector(
            generator=generator,
            rewards=rewards,
            tokenizer=tokenizer,
            algorithm=algorithm,
            num_generations=settings.num_generations,
            max_completion_length=settings.max_completion_length,
            seed=settings.seed,
            whole_weights=partial(whole_weights, accelerator, self.policy),
            failures=self.state.failures,
        )
        self.updater = PolicyUpdater(
            accelerator=accelerator,
            policy=self.policy,
            plain=bare,
            optimizer=self.optimizer,
            algorithm=algorithm,
            settings=settings,
            rate=rate_function(settings),
        )
        self.rehearsal: Rehearsal | None = None

    @property
    def sampling(self) -> SamplingSettings:
        """How completions of the training are drawn."""
        s = self.settings
        return SamplingSettings(
            max_new_tokens=s.max_completion_length,
            temperature=s.temperature,
            top_p=s.top_p,
            top_k=s.top_k,
            min_p=s.min_p,
            stop=s.stop,
        )

    def train(self) -> RunState:
        """Train to the end, from the last checkpoint if there is one.

        Returns:
            The final state.

        Raises:
            FloatingPointError: Gradient or weights became NaN or infinite; the last checkpoint is sound.
        """
        self._resume()
        if "rehearsal" in self.algorithm.needs:
            self.rehearsal = self._rehearsal()
        if self.state.step == 0 and self.eval_prompts:
            self._log({"step": 0} | self._evaluation())
        while self.state.step < self.settings.steps:
            row = self._step()
            step = self.state.step
            is_last = step == self.settings.steps
            is_measured = self.settings.eval_steps and step % self.settings.eval_steps == 0
            if self.eval_prompts and (is_last or is_measured):
                row |= self._evaluation()
            self._log(row)
            if is_last or step % self.settings.save_steps == 0:
                self.save()
        return self.state

    def save(self) -> None:
        """Write a checkpoint; every process calls it."""
        checkpoint.check_finite(self.policy)
        checkpoint.save(self.folder, self.accelerator, self.state)

    def _resume(self) -> None:
        found = checkpoint.load(self.folder, self.accelerator)
        if found is not None:
            self.state = found
            self.collector.failures = found.failures
        if self.accelerator.is_main_process:
            for kept in (self.history, self.completions):
                kept.truncate(-1 if found is None else self.state.step)

    def _step(self) -> dict[str, Any]:
        """One rollout step; gives its metrics."""
        clock = [time.perf_counter()]
        state = self.state
        numbers, groups = self._sample()
        clock.append(time.perf_counter())
        batch = self._batch(numbers, groups)
        parts = self.updater.parts(batch)
        if self.updater.needs_old_pass:
            batch = self.updater.old_pass(batch, parts)
        if self.reference is not None:
            batch = self._with_reference(batch, self.reference, parts)
        clock.append(time.perf_counter())
        context = self._context(batch)
        batch = batch.with_(advantages=self._advantages(batch, context))
        sums = Sums()
        add_rollout_metrics(sums, batch)
        if self._teaches_nothing(batch):
            state.skipped += 1
        else:
            state.updates += self.updater.update(batch, parts, context, sums, state.updates)
        state.step += 1
        state.method = context.state
        clock.append(time.perf_counter())
        return self._row(sums, groups, clock)

    def _sample(self) -> tuple[list[int], list[RolloutGroup]]:
        """This process's groups and their numbers among those of the step.

        Methods that drop groups of equal rewards sample on, all processes together, until there are enough.
        """
        settings, state, accelerator = self.settings, self.state, self.accelerator
        wanted = settings.prompts_per_step
        mine = slice(accelerator.process_index, None, accelerator.num_processes)
        rounds = settings.max_sampling_rounds if self.algorithm.drops_uninformative else 1
        pool, found = self._pool(), []
        for number in range(rounds):
            drawn = draw_order(len(pool), state.position, wanted, settings.seed)
            state.position += wanted
            places = [(number * wanted + i, self.prompts[pool[index]]) for i, index in enumerate(drawn)][mine]
            groups = self.collector.collect(places, self.sampling, step=state.step, version=state.updates)
            found += list(zip((place for place, _ in places), groups, strict=True))
            if rounds > 1 and sum(gather_object([self._informative(found)])) >= wanted:
                break
        if rounds > 1:
            everything = gather_object(found) if accelerator.num_processes > 1 else found
            # Those that teach first, the others only to fill up; then in the order in which they were drawn.
            best = sorted(everything, key=lambda pair: (not pair[1].is_informative, pair[0]))[:wanted]
            found = sorted(best, key=lambda pair: pair[0])[mine]
            numbers = list(range(wanted))[mine]
            return numbers, [group for _, group in found]
        return [number for number, _ in found], [group for _, group in found]

    @staticmethod
    def _informative(found: Sequence[tuple[int, RolloutGroup]]) -> int:
        return sum(group.is_informative for _, group in found)

    def _pool(self) -> Sequence[int]:
        """Prompts that are explored."""
        return range(len(self.prompts)) if self.rehearsal is None else self.rehearsal.explored

    def _batch(self, numbers: list[int], groups: list[RolloutGroup]) -> PolicyBatch:
        """With rehearsal samples, each process its share."""
        settings, state, accelerator = self.settings, self.state, self.accelerator
        if self.rehearsal is not None and self.rehearsal.samples:
            unit = accelerator.num_processes * settings.mini_batches
            count = unit * max(1, round(settings.rehearsal_share * self.completions_per_step / unit))
            mine = slice(accelerator.process_index, None, accelerator.num_processes)
            drawn = self.rehearsal.draw(state.rehearsed, count, settings.seed)[mine]
            state.rehearsed += count
            groups = [*groups, *(sample.group(self.prompts) for sample in drawn)]
            numbers = [*numbers, *range(REHEARSAL_GROUP, REHEARSAL_GROUP + count)[mine]]
        return policy_batch(
            groups,
            pad_id=self.pad_id,
            masks_truncated=settings.mask_truncated_completions,
            group_ids=numbers,
        )

    @property
    def completions_per_step(self) -> int:
        """Of all processes, rehearsal left out."""
        return self.settings.prompts_per_step * self.settings.num_generations

    def _with_reference(
        self, batch: PolicyBatch, reference: Reference, parts: list[list[list[int]]]
    ) -> PolicyBatch:
        found = torch.zeros(batch.completion_ids.shape)
        for rows in (rows for mini in parts for rows in mini):
            micro = batch.select(rows).to(self.accelerator.device)
            logprobs = reference.logprobs(micro, temperature=self.settings.temperature)
            found[rows, : logprobs.shape[1]] = logprobs.float().cpu()
        if batch.ref_logprobs is not None:  # of rehearsal samples
            found = torch.where(batch.is_rehearsal[:, None], batch.ref_logprobs, found)
        return batch.with_(ref_logprobs=found)

    def _context(self, batch: PolicyBatch) -> MethodContext:
        context = MethodContext(
            step=self.state.step,
            total_steps=self.settings.steps,
            max_completion_length=self.settings.max_completion_length,
            state=self.state.method,
        )
        if batch.old_entropies is not None:
            mask = batch.policy_mask
            total = torch.stack([batch.old_entropies[mask].double().sum(), mask.sum().double()])
            total = self.accelerator.reduce(total.to(self.accelerator.device), reduction="sum")
            context.mean_entropy = float(total[0] / total[1].clamp_min(1))  # pyright: ignore
        if (observe := self.algorithm.bound("observe")) is not None:
            observe(context)
        return context

    def _advantages(self, batch: PolicyBatch, context: MethodContext) -> Tensor:
        """``[B, L]``, 0 outside of the policy's tokens."""
        found = self.algorithm.bound("advantage")(batch, context)  # pyright: ignore[reportOptionalCall]
        wide = found[:, None].expand(batch.completion_ids.shape) if found.ndim == 1 else found
        return torch.where(batch.policy_mask, wide.float(), 0.0)

    def _teaches_nothing(self, batch: PolicyBatch) -> bool:
        """Whether no process has an advantage, and no other loss is there."""
        s, method = self.settings, self.algorithm
        if s.beta or s.entropy_coef or s.router_aux_loss_coef or method.regularizer is not None:
            return False
        assert batch.advantages is not None
        has_any = torch.tensor([float(batch.advantages.abs().sum())], device=self.accelerator.device)
        return float(self.accelerator.reduce(has_any, reduction="sum")) == 0  # pyright: ignore

    def _evaluation(self) -> dict[str, float]:
        """Metrics on held-out prompts, under names that begin with ``eval_``."""
        settings = self.settings
        plain: Any = replace(self.algorithm, shaper=None)
        collector = replace(self.collector, algorithm=plain, num_generations=settings.eval_generations)
        temperature = settings.eval_temperature
        sampling = replace(self.sampling, temperature=temperature or 1.0, greedy=temperature == 0)
        found = evaluate(collector, self.eval_prompts, sampling, self.accelerator, pass_at=settings.pass_at)
        return {f"eval_{name}": value for name, value in found.items()}

    def _rehearsal(self) -> Rehearsal:
        """Found before the first step, and kept for a run that goes on."""
        path = self.folder / REHEARSAL_FILE
        found = read_rehearsal(path)
        if found is None:
            if self.state.step:
                raise ValueError(f"'{path}' is gone, and the policy is no longer what it was; begin anew")
            settings = self.settings
            collector = replace(self.collector, num_generations=settings.rehearsal_generations)
            found = build_rehearsal(
                collector,
                self.prompts,
                self.sampling,
                self.accelerator,
                self._own_logprobs,
                pass_at=settings.pass_at,
                threshold=settings.rehearsal_threshold,
            )
            if self.accelerator.is_main_process:
                write_rehearsal(path, found)
            self.accelerator.wait_for_everyone()
        return found

    def state_dict(self) -> dict[str, Any]:
        """The model's, whole, on the main process; every process calls it."""
        found = self.accelerator.get_state_dict(self.policy)
        prefix = "model."  # `Policy.model`
        return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}

    def _row(self, sums: Sums, groups: Sequence[RolloutGroup], clock: list[float]) -> dict[str, Any]:
        """What is known of a finished step."""
        state = self.state
        row: dict[str, Any] = {"step": state.step, "updates": state.updates, "skipped_steps": state.skipped}
        row |= finish_covariance(sums.means(self.accelerator))
        row["learning_rate"] = self.updater.rate(state.updates)
        row["reward_failures"] = sum(state.failures.values())
        names = ("time/rollouts", "time/old_logprobs", "time/updates")
        row |= {name: after - before for name, before, after in zip(names, clock, clock[1:], strict=False)}
        row["completions_per_second"] = self.completions_per_step / (clock[-1] - clock[0])
        if self.accelerator.is_main_process and state.step % self.settings.logging_steps == 0:
            for rollout, reward in list(zip(groups[0].rollouts, groups[0].rewards.tolist(), strict=True))[
                :SHOWN
            ]:
                self.completions.append(
                    {
                        "step": state.step,
                        "prompt": groups[0].prompt.text,
                        "completion": rollout.text,
                        "reward": reward,
                    }
                )
        return row

    def _log(self, row: dict[str, Any]) -> None:
        """Keep a row, and show it."""
        if not self.accelerator.is_main_process:
            return
        self.history.append(row)
        is_shown = row["step"] % self.settings.logging_steps == 0 or row["step"] == self.settings.steps
        if self.on_row is not None and is_shown:
            self.on_row(row)

    @torch.no_grad()
    def _own_logprobs(self, batch: PolicyBatch) -> Tensor:
        """By the training engine, whatever the other processes do."""
        found = torch.zeros(batch.completion_ids.shape)
        with whole_weights(self.accelerator, self.policy):
            for rows in torch.arange(len(batch)).split(self.settings.micro_batch_size):
                micro = batch.select(rows).to(self.accelerator.device)
                now = statistics_of(self.updater.plain, micro, temperature=self.settings.temperature)
                found[rows, : now.logprobs.shape[1]] = now.logprobs.float().cpu()
        return found
