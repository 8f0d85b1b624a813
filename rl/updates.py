"""Optimizer steps on the completions of a rollout step."""

# B completions, L positions, N valid tokens of a mini-batch on all processes

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from ..moe.router_replay import RoutedExperts, record_choices, replay_choices
from .algorithm import Algorithm, MethodContext, SelectionInputs, TokenStatistics
from .batch import PolicyBatch
from .optimizer import set_rate
from .policy import Policy, statistics_of
from .reduction import Counts, count, reduce_loss
from .seeds import seed_of
from .settings import PolicySettings
from .step_metrics import add_update_metrics
from .sums import Sums

Rows = list[int]


@dataclass(kw_only=True)
class PolicyUpdater:
    """Computes old log-probs, and takes the optimizer steps of an algorithm.

    Attributes:
        accelerator: Divides the work.
        policy: As `Accelerator.prepare` returned it.
        plain: The policy without what wraps it.
        optimizer: Of the policy.
        algorithm: What is minimised.
        settings: How.
        rate: The learning rate at each optimizer step.
    """

    accelerator: Accelerator
    policy: nn.Module
    plain: Policy
    optimizer: Optimizer
    algorithm: Algorithm
    settings: PolicySettings
    rate: Callable[[int], float]
    routes: dict[int, RoutedExperts] = field(default_factory=dict, init=False)
    """Experts that were chosen in the old pass, by the first row of a micro-batch."""

    @property
    def needs_old_pass(self) -> bool:
        """Whether log-probs before the updates differ from those in the update, or are wanted before it."""
        return (
            self.settings.updates_per_rollout > 1
            or self.settings.router_replay
            or bool(self.algorithm.needs & {"old-pass", "mean-vocab-logprobs"})
        )

    def parts(self, batch: PolicyBatch) -> list[list[Rows]]:
        """Rows of each micro-batch of each mini-batch: whole groups, and within a mini-batch by length."""
        lengths = (batch.token_mask.sum(1) + batch.prompt_mask.sum(1)).tolist()
        ids, micro = batch.group_ids.tolist(), self.settings.micro_batch_size
        mine: list[Rows] = [[] for _ in range(self.settings.mini_batches)]
        for kind in (~batch.is_rehearsal, batch.is_rehearsal):
            groups = batch.group_ids[kind].unique(sorted=True).tolist()
            size = max(1, -(-len(groups) // len(mine)))
            place = {group: number // size for number, group in enumerate(groups)}
            for row, group in enumerate(ids):
                if group in place:
                    mine[place[group]].append(row)
        ordered = [sorted(rows, key=lambda row: lengths[row]) for rows in mine]
        return [[rows[i : i + micro] for i in range(0, len(rows), micro)] for rows in ordered]

    @torch.no_grad()
    def old_pass(self, batch: PolicyBatch, parts: list[list[Rows]]) -> PolicyBatch:
        """The batch with log-probs, entropies and what else is wanted of the policy as it is."""
        names = {"old_logprobs": "logprobs", "old_entropies": "entropies"}
        if "mean-vocab-logprobs" in self.algorithm.needs:
            names["old_mean_vocab_logprobs"] = "mean_vocab_logprobs"
        found = {name: torch.zeros(batch.completion_ids.shape) for name in names}
        self.routes.clear()
        for rows in (rows for mini in parts for rows in mini):
            micro = batch.select(rows).to(self.accelerator.device)
            with self._recording(rows):
                now = self._statistics(micro)
            for name, source in names.items():
                value = getattr(now, source)
                found[name][rows, : value.shape[1]] = value.float().cpu()
        return batch.with_(**found)

    def update(
        self, batch: PolicyBatch, parts: list[list[Rows]], context: MethodContext, sums: Sums, number: int
    ) -> int:
        """All optimizer steps on a batch that has its advantages.

        Args:
            batch: Of this process.
            parts: What `parts` gave.
            context: For the method.
            sums: Metrics are added to it.
            number: Optimizer steps done before.

        Returns:
            Optimizer steps taken.
        """
        taken = 0
        for _ in range(self.settings.num_iterations):
            for mini in parts:
                micros = [batch.select(rows).to(self.accelerator.device) for rows in mini]
                keys = [rows[0] for rows in mini]
                if self.algorithm.selection is not None:
                    micros = self._selected(micros, keys, number + taken, is_first=taken == 0)
                set_rate(self.optimizer, self.rate(number + taken))
                self._step(micros, keys, context, sums)
                taken += 1
        return taken

    def _step(
        self, micros: Sequence[PolicyBatch], keys: Sequence[int], context: MethodContext, sums: Sums
    ) -> None:
        main, extra = self._counts(micros)
        for number, (micro, key) in enumerate(zip(micros, keys, strict=True)):
            with self._accumulating(is_last=number == len(micros) - 1), self._replaying(key):
                now, loss = self._loss(micro, main, extra, context, sums, len(micros))
                # Processes are averaged, and accelerate divides by its accumulation steps.
                scale = self.accelerator.num_processes * self.accelerator.gradient_accumulation_steps
                self.accelerator.backward(loss * scale)
        self._clip_and_step(sums)

    def _loss(
        self,
        micro: PolicyBatch,
        main: Counts,
        extra: Counts,
        context: MethodContext,
        sums: Sums,
        num_micros: int,
    ) -> tuple[TokenStatistics, Tensor]:
        settings = self.settings
        now = self._statistics(micro, gradient=True)
        if micro.old_logprobs is None:
            micro = micro.with_(old_logprobs=now.logprobs.detach(), old_entropies=now.entropies.detach())
        mask_BL = micro.policy_mask
        found = self.algorithm.bound("policy_loss")(now, micro, context)  # pyright: ignore[reportOptionalCall]
        values_BL = found.values
        if settings.beta:
            assert micro.ref_logprobs is not None
            values_BL = values_BL + settings.beta * k3(now.logprobs, micro.ref_logprobs)
        if settings.entropy_coef:
            values_BL = values_BL - settings.entropy_coef * now.entropies
        loss = reduce_loss(values_BL, mask_BL, self.algorithm.reduction, main)
        sums.add("policy_loss", loss, 1 / (num_micros * self.accelerator.num_processes))
        add_update_metrics(sums, now, micro, mask_BL, found.metrics)
        if (regularizer := self.algorithm.bound("regularizer")) is not None:
            more, more_mask_BL = regularizer(now, micro, context), self._regularizer_mask(micro)
            reduced = reduce_loss(more.values, more_mask_BL, self.algorithm.regularizer_reduction, extra)
            sums.add("regularizer_loss", reduced, 1 / (num_micros * self.accelerator.num_processes))
            sums.add_tokens(more.metrics, more_mask_BL)
            loss = loss + reduced
        if now.router_loss is not None:
            share = num_micros * self.accelerator.num_processes
            loss = loss + settings.router_aux_loss_coef * now.router_loss / share
            sums.add("aux_loss", now.router_loss, 1)
        return now, loss

    def _counts(self, micros: Sequence[PolicyBatch]) -> tuple[Counts, Counts]:
        """Of the policy loss and of the regularizer, over all processes."""
        longest = self.settings.max_completion_length
        found = []
        for micro in micros:
            is_rehearsal = micro.is_rehearsal
            is_extra = is_rehearsal if self._regularizes_rehearsal else ~is_rehearsal
            for mask, rows in (
                (micro.policy_mask, ~is_rehearsal),
                (self._regularizer_mask(micro), is_extra),
            ):
                counts = count(mask, rows, longest)
                found.append(torch.stack([counts.tokens, counts.sequences]))
        totals = torch.stack(found).view(len(micros), 2, 2).sum(0)
        totals = self.accelerator.reduce(totals, reduction="sum")
        main, extra = (Counts(tokens=t[0], sequences=t[1], max_length=longest) for t in totals)
        return main, extra

    @property
    def _regularizes_rehearsal(self) -> bool:
        return "rehearsal" in self.algorithm.needs

    def _regularizer_mask(self, micro: PolicyBatch) -> Tensor:
        if self._regularizes_rehearsal:
            return micro.rehearsal_mask
        return micro.policy_mask

    def _statistics(self, micro: PolicyBatch, *, gradient: bool = False) -> TokenStatistics:
        needs = self.algorithm.needs
        return statistics_of(
            self.policy,
            micro,
            temperature=self.settings.temperature,
            with_entropy_gradient=gradient
            and ("entropy-gradient" in needs or self.settings.entropy_coef > 0),
            with_mean_vocab="mean-vocab-logprobs" in needs,
        )

    def _selected(
        self, micros: list[PolicyBatch], keys: Sequence[int], number: int, *, is_first: bool
    ) -> list[PolicyBatch]:
        """With the tokens that the method selects among all of a mini-batch (or of each micro-batch)."""
        if self.settings.selection_scope == "microbatch":
            return [
                micro
                for m, key in zip(micros, keys, strict=True)
                for micro in self._select_among([m], [key], number, is_first=is_first, is_global=False)
            ]
        return self._select_among(micros, keys, number, is_first=is_first, is_global=True)

    @torch.no_grad()
    def _select_among(
        self,
        micros: Sequence[PolicyBatch],
        keys: Sequence[int],
        number: int,
        *,
        is_first: bool,
        is_global: bool,
    ) -> list[PolicyBatch]:
        rows = []
        for micro, key in zip(micros, keys, strict=True):
            logprobs = micro.old_logprobs
            if not is_first:
                with self._replaying(key):
                    logprobs = self._statistics(micro).logprobs
            mask = micro.policy_mask
            place = micro.group_ids[:, None] * 2**20 + torch.arange(mask.shape[1], device=mask.device)
            columns = (logprobs, micro.old_logprobs, micro.advantages, place.expand_as(mask))
            rows.append(torch.stack([c[mask].double() for c in columns]))  # pyright: ignore[reportOptionalSubscript]
        own = torch.cat(rows, dim=1).T.contiguous()
        tokens, mine = self._gathered(own) if is_global else (own, slice(None))
        # By group and position, so that the number of processes does not change what is drawn.
        order = torch.argsort(tokens[:, 3], stable=True)
        inputs = SelectionInputs(
            logprobs=tokens[order, 0].float(),
            old_logprobs=tokens[order, 1].float(),
            advantages=tokens[order, 2].float(),
            generator=torch.Generator(device="cpu").manual_seed(
                seed_of(self.settings.seed, "selection", number, -1 if is_global else keys[0])
            ),
        )
        chosen = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        chosen[order] = self.algorithm.bound("selection")(inputs)  # pyright: ignore[reportOptionalCall]
        parts = chosen[mine].split([int(m.policy_mask.sum()) for m in micros])
        found = []
        for micro, part in zip(micros, parts, strict=True):
            mask = micro.policy_mask
            found.append(micro.with_(selected=torch.zeros_like(mask).masked_scatter(mask, part)))
        return found

    def _gathered(self, own: Tensor) -> tuple[Tensor, slice]:
        """Rows of all processes, and where this one's are."""
        accelerator = self.accelerator
        if accelerator.num_processes == 1:
            return own, slice(None)
        lengths = accelerator.gather(torch.tensor([len(own)], device=own.device)).tolist()  # pyright: ignore
        padded = accelerator.pad_across_processes(own, dim=0)
        everything = accelerator.gather(padded).view(len(lengths), max(lengths), -1)  # pyright: ignore
        start = sum(lengths[: accelerator.process_index])
        kept = torch.cat([part[:length] for part, length in zip(everything, lengths, strict=True)])
        return kept, slice(start, start + len(own))

    @contextmanager
    def _accumulating(self, *, is_last: bool) -> Iterator[None]:
        self.accelerator.gradient_state._set_sync_gradients(is_last)
        with nullcontext() if is_last else self.accelerator.no_sync(self.policy):
            yield

    @contextmanager
    def _recording(self, rows: Rows) -> Iterator[None]:
        if not self.settings.router_replay:
            yield
            return
        with record_choices(self.plain.plain) as routes:
            yield
        self.routes[rows[0]] = routes

    @contextmanager
    def _replaying(self, key: int) -> Iterator[None]:
        if not self.settings.router_replay:
            yield
            return
        with replay_choices(self.plain.plain, self.routes[key]):
            yield

    def _clip_and_step(self, sums: Sums) -> None:
        limit = self.settings.max_grad_norm or float("inf")
        norm: Any = self.accelerator.clip_grad_norm_(self.policy.parameters(), limit)
        if norm is not None:
            value = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(float(norm))
            if not torch.isfinite(value):
                raise FloatingPointError(
                    "the gradient holds NaN or infinity; lower the learning rate, or compute in float32"
                )
            sums.add("grad_norm", value, 1)
        self.optimizer.step()
        self.optimizer.zero_grad()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Schulman's estimate of KL(policy || reference) for tokens of the policy: ``e^d - d - 1``, d = ref - now."""
    difference = ref_logprobs - logprobs
    return difference.exp() - difference - 1
