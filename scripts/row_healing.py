"""Healing during which rows of S go, as a training that can be gone on with."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..compress.low_rank import RowPruner, RowPruning
from ..distill import DistillTrainer

FILE_NAME = "row_importance.safetensors"


class RowHealingTrainer(DistillTrainer):
    """`DistillTrainer` whose checkpoints hold the importance of the rows too.

    Args:
        pruner: Which prunes them.
        callbacks: As for Trainer.
        given: As for `DistillTrainer`.
    """

    def __init__(self, *, pruner: RowPruner, callbacks: list[Any], **given: Any) -> None:
        super().__init__(callbacks=[*callbacks, pruner], **given)
        self.pruner = pruner

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        # Before Trainer's own state, which is written last: what has that is whole.
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            save_file(self.pruner.state_dict(), Path(str(output_dir or self.args.output_dir)) / FILE_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.pruner.load_state_dict(load_file(Path(resume_from_checkpoint) / FILE_NAME))


def row_pruner(model: nn.Module, final: float, steps: int) -> RowPruner:
    """With the phases of MC-SMoE's code in proportion: a tenth of the steps first, two fifths last.

    Args:
        model: With all rows.
        final: Share of them that stays.
        steps: Of the healing.
    """
    phases = {"warm_up": steps // 10, "cool_down": 2 * steps // 5}
    return RowPruner(model, RowPruning(final=final, total=steps, **phases))
