"""What a training run says while it goes."""

import sys
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from .console import is_interactive

SHOWN = {
    "loss": "loss {:.4g}",
    "task": "labels {:.4g}",
    "distillation": "teacher {:.4g}",
    "alignment_factor": "factor {:.3g}",
    "eval_cross_entropy": "held-out loss {:.4g}",
    "eval_accuracy": "accuracy {:.1%}",
    "active_experts": "k {:.3g}",
    "learning_rate": "lr {:.2g}",
    "grad_norm": "gradient {:.2g}",
    "max_load": "load {:.2f}",
    "dead_experts": "dead experts {:.0f}",
}
"""Logged numbers that are shown, and how; ``max_load`` is that of the busiest expert over the mean."""


class TrainingLines(TrainerCallback):
    """A line on standard error for each log, below a progress bar if someone is looking.

    The last step is always logged, and a run that is no longer than ``logging_steps`` at its half too: two
    points make a curve.
    """

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the bar where the run begins or goes on."""
        if state.is_world_process_zero:
            hidden = not is_interactive()
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="training", unit="step", disable=hidden
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar, and see to the log of short runs."""
        half = state.max_steps // 2 if state.logging_steps >= state.max_steps else 0
        if args.logging_strategy == IntervalStrategy.STEPS and state.global_step in (half, state.max_steps):
            control.should_log = True
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n if not self.bar.disable else 0)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say what was logged, but not the totals of the end."""
        logs = kwargs["logs"]
        parts = [form.format(float(logs[key])) for key, form in SHOWN.items() if key in logs]
        if self.bar is not None and parts:
            tqdm.write(f"step {state.global_step} of {state.max_steps}: {', '.join(parts)}", file=sys.stderr)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
