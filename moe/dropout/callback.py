"""The schedule of active experts in any Hugging Face Trainer."""

from statistics import fmean
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .convert import require_smoe_layers, set_active_experts
from .schedule import KSchedule, check_active


class ActiveExpertsCallback(TrainerCallback):
    """Sets the scheduled number of active experts for the time of each optimizer step.

    Between two steps, so in every evaluation, in every checkpoint and after the training, the model has
    ``eval_experts``. Nothing is stored: k follows from the Trainer's own count of steps, so a resumed run
    equals an uninterrupted one, and whatever another callback sets is undone before the next step.

    The training logs get ``active_experts``, the k of the last step or its mean over the layers. Reporters
    that the Trainer makes by itself (``report_to``) run before the callbacks that are given to it and miss
    the value; for them: ``trainer.callback_handler.callbacks.insert(0, callback)``.

    Args:
        schedule: k of every step; stretched over the Trainer's ``max_steps``.
        eval_experts: k between steps; by default the schedule's ``k_end``.

    Raises:
        ValueError: ``eval_experts`` is not between 1 and E; when the training begins, a layer that has not
            the schedule's number of experts.
        UnsupportedModelError: When the training begins, a model without SMoE-Dropout layers.

    Reference: Chen et al., Sparse MoE as the New Dropout (ICLR 2023), arXiv:2303.01610.

    *Departs from the paper*: the release evaluates at a k that it did not train (2, where training has 8 to
    16), and leaves that k in the model and in the file it saves.
    """

    def __init__(self, schedule: KSchedule, *, eval_experts: int | None = None) -> None:
        self.schedule = schedule
        self.eval_experts = schedule.k_end if eval_experts is None else eval_experts
        check_active("eval_experts", self.eval_experts, schedule.num_experts)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a model that the schedule does not fit; evaluation comes first with ``eval_on_start``."""
        for name, layer in require_smoe_layers(kwargs["model"]).items():
            if layer.num_experts != self.schedule.num_experts:
                raise ValueError(
                    f"the schedule is for num_experts={self.schedule.num_experts}, "
                    f"but layer {name!r} has {layer.num_experts}"
                )
        self._leave_step(args, state, control, **kwargs)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Once for all micro-batches of an optimizer step."""
        model = kwargs["model"]
        set_active_experts(model, self._scheduled(state.global_step, state, model))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell k to the callbacks after this one, and to the Trainer's history."""
        logs = kwargs["logs"]
        if "loss" not in logs:  # an evaluation, or the summary of the training
            return
        k = self._scheduled(state.global_step - 1, state, kwargs["model"])
        for record in (logs, *state.log_history[-1:]):
            record["active_experts"] = k if isinstance(k, int) else fmean(k)

    def _leave_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        set_active_experts(kwargs["model"], self.eval_experts)

    on_step_end = _leave_step  # the Trainer logs, evaluates and saves after this
    on_evaluate = _leave_step  # a sweep over k may have gone before, and saving comes after
    on_epoch_end = _leave_step  # data that ends within an accumulation ends no step
    on_train_end = _leave_step

    def _scheduled(self, step: int, state: TrainerState, model: Any) -> int | tuple[int, ...]:
        return self.schedule.active_experts(step, state.max_steps, len(require_smoe_layers(model)))
