"""Tokens that Clip-Cov and KL-Cov select among all of a mini-batch, however it is cut."""

# B completions, L positions, n valid tokens of this process, N of all processes

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from .algorithm import Algorithm, SelectionInputs
from .batch import PolicyBatch
from .seeds import seed_of
from .settings import PolicySettings

MOST_POSITIONS = 2**20


@dataclass(kw_only=True)
class Selector:
    """Calls an algorithm's selection.

    Attributes:
        accelerator: Divides the mini-batch.
        algorithm: With a selection.
        settings: Say among what it selects, and the seed.
    """

    accelerator: Accelerator
    algorithm: Algorithm
    settings: PolicySettings

    @torch.no_grad()
    def select(
        self, micros: Sequence[PolicyBatch], logprobs: Sequence[Tensor], number: int
    ) -> list[PolicyBatch]:
        """The micro-batches with ``selected``.

        Args:
            micros: Of a mini-batch of this process, with advantages and old log-probs.
            logprobs: ``[B, L]`` of each, of the policy as it is.
            number: Of the optimizer step; what is drawn depends on it.
        """
        if self.settings.selection_scope == "microbatch":
            place = self.accelerator.process_index
            return [
                self._select([micro], [own], ("selection", number, place, part), is_global=False)[0]
                for part, (micro, own) in enumerate(zip(micros, logprobs, strict=True))
            ]
        return self._select(micros, logprobs, ("selection", number), is_global=True)

    def _select(
        self,
        micros: Sequence[PolicyBatch],
        logprobs: Sequence[Tensor],
        place: tuple[str | int, ...],
        *,
        is_global: bool,
    ) -> list[PolicyBatch]:
        pairs = zip(micros, logprobs, strict=True)
        own_n4 = torch.cat([_columns(micro, values_BL) for micro, values_BL in pairs])
        tokens_N4, mine = self._gathered(own_n4) if is_global else (own_n4, slice(None))
        # By group and position, so that neither the cut nor the number of processes changes what is drawn.
        order_N = torch.argsort(tokens_N4[:, 3], stable=True)
        sorted_N4 = tokens_N4[order_N]
        inputs = SelectionInputs(
            logprobs=sorted_N4[:, 0].float(),
            old_logprobs=sorted_N4[:, 1].float(),
            advantages=sorted_N4[:, 2].float(),
            generator=torch.Generator().manual_seed(seed_of(self.settings.seed, *place)),
        )
        chosen_N = torch.zeros(len(tokens_N4), dtype=torch.bool, device=tokens_N4.device)
        chosen_N[order_N] = self.algorithm.bound("selection")(inputs)  # pyright: ignore[reportOptionalCall]
        masks = [micro.policy_mask for micro in micros]
        parts = chosen_N[mine].split([int(mask_BL.sum()) for mask_BL in masks])
        return [
            micro.with_(selected=torch.zeros_like(mask_BL).masked_scatter(mask_BL, part))
            for micro, mask_BL, part in zip(micros, masks, parts, strict=True)
        ]

    def _gathered(self, own_n4: Tensor) -> tuple[Tensor, slice]:
        """Rows of all processes, and where this one's are."""
        accelerator = self.accelerator
        if accelerator.num_processes == 1:
            return own_n4, slice(None)
        count = torch.tensor([len(own_n4)], device=own_n4.device)
        lengths = accelerator.gather(count).tolist()  # pyright: ignore[reportAttributeAccessIssue]
        padded = accelerator.pad_across_processes(own_n4, dim=0)
        everything = accelerator.gather(padded).view(len(lengths), max(lengths), 4)  # pyright: ignore
        start = sum(lengths[: accelerator.process_index])
        kept = torch.cat([part[:length] for part, length in zip(everything, lengths, strict=True)])
        return kept, slice(start, start + len(own_n4))


def _columns(micro: PolicyBatch, logprobs_BL: Tensor) -> Tensor:
    """Log-probs, old ones, advantages and places of the valid tokens, ``[n, 4]`` float64."""
    mask_BL = micro.policy_mask
    positions_L = torch.arange(mask_BL.shape[1], device=mask_BL.device)
    places_BL = micro.group_ids[:, None] * MOST_POSITIONS + positions_L
    columns = (logprobs_BL, micro.required("old_logprobs"), micro.required("advantages"), places_BL)
    return torch.stack([values_BL[mask_BL].double() for values_BL in columns], dim=1)
