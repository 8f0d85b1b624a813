"""The Trainer of students: Transformers' own, with another loss."""

# B batch, S sequence, N rows that count

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from ..moe.checkpoint import save_checkpoint
from ..moe.trainer import MoETrainer, check_one_gpu, reload_weights
from .counted import TEACHER_POSITIONS, counted_rows, labelled_rows
from .dual_head import HEAD_FILE, SPEC_FILE, DualHeadStudent
from .losses import ValidRows, masked_mean
from .student import StudentInTraining
from .teachers import Teacher, model_inputs

ALIGNMENT_FILE = "gradient_alignment.safetensors"
PARTS = ("task", "distillation", "expert_load")


class NonFiniteLossError(ValueError):
    """The loss became NaN or infinite."""


class DistillTrainer(MoETrainer):
    """Trains a `StudentInTraining` on what a teacher says.

    Data are rows of the student's inputs with ``labels``, as any Trainer's; ``row``, the number of the
    example, for a teacher cache; ``teacher_inputs`` where the teacher reads other inputs. The loss is the
    recipe's, over the rows of all micro-batches and processes that count. Evaluation is the plain model's: of
    a language model it gives no logits but, for each example, the sums of `label_measures`.

    Args:
        *args: As for Trainer; the model is a `StudentInTraining`.
        teacher: Model or cache; ``None`` for labels only.
        stop_epoch: From this epoch on, counted from 0, there is no teacher: it is dropped, and the auxiliary
            head with it.
        **kwargs: As for Trainer.

    Raises:
        ValueError: An alignment over parameters that several processes or micro-batches share, ZeRO-3, or
            several GPUs in one process.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self, *args: Any, teacher: Teacher | None, stop_epoch: float | None = None, **kwargs: Any
    ) -> None:
        arguments: TrainingArguments = kwargs["args"]
        arguments.remove_unused_columns = False  # the student's forward does not name its inputs
        arguments.label_names = ["labels"]
        arguments.logging_nan_inf_filter = False  # which would hide them
        if arguments.ddp_find_unused_parameters is None:
            arguments.ddp_find_unused_parameters = stop_epoch is not None
        super().__init__(*args, **kwargs)
        self.teacher = teacher
        self.stop_epoch = stop_epoch
        self.sums: dict[str, Tensor] = {}
        self.num_batches = self.num_steps = 0
        self.num_taught: Tensor | None = None
        self.is_finite: Tensor | None = None
        self.add_callback(_StepEnd(self))
        self._check()

    @property
    def student(self) -> StudentInTraining:
        """The model without what wraps it."""
        found = self.plain_model
        assert isinstance(found, StudentInTraining)
        return found

    def _check(self) -> None:
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is not None and plugin.zero_stage == 3:
            raise ValueError(
                "distillation works on whole heads, which DeepSpeed ZeRO-3 divides; take ZeRO-2 or FSDP2"
            )
        for name in ("label_smoothing_factor", "torch_compile"):
            if getattr(self.args, name):
                raise ValueError(
                    f"distillation has no use for {name}; leave it out of the training arguments"
                )
        check_one_gpu(self.args, "distillation")
        if self.student.alignment is not None:
            check_alignment(self.student.alignment.where, self.args)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the recipe's loss in training, and the plain model's cross-entropy in evaluation."""
        rows = self._rows(inputs)
        labels = inputs["labels"] if rows is None else rows.labels
        if not model.training:
            return self._evaluate_batch(model, inputs, labels, rows, return_outputs)
        student = self.student
        if student.alignment is not None:
            student.alignment.begin_step(self.state.global_step, self.current_gradient_accumulation_steps)
        taught = self._taught(inputs)
        said = None if self.teacher is None else self.teacher.says(inputs, rows if taught is None else taught)
        parts = model(
            model_inputs(inputs),
            labels=labels,
            rows=rows,
            said=said,
            num_items=num_items_in_batch,
            taught=taught,
            num_taught=None if num_items_in_batch is None else self.num_taught,
        )
        loss = parts["loss"]
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        if "expert_load" in parts:
            share = student.recipe.load_balance / self.current_gradient_accumulation_steps
            loss = loss + share * parts["expert_load"]
        self._note(loss, parts)
        return (loss, parts) if return_outputs else loss

    def _evaluate_batch(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        labels_N: Tensor,
        rows: ValidRows | None,
        return_outputs: bool,
    ) -> Any:
        outputs = model(model_inputs(inputs), rows=rows)
        if rows is not None and "measures" in outputs:
            found_N3 = outputs["measures"]
            loss = masked_mean(found_N3[:, 0])
            outputs = {"measures": rows.sum_by_example(found_N3)}
        else:
            logits = outputs["logits"] if rows is None else rows.pack(outputs["logits"])
            loss = nn.functional.cross_entropy(logits.float(), labels_N)
        return (loss, outputs) if return_outputs else loss

    def _rows(self, inputs: Mapping[str, Any]) -> ValidRows | None:
        return labelled_rows(inputs, is_language_model=self.student.scale is not None)

    def _taught(self, inputs: Mapping[str, Any]) -> ValidRows | None:
        """Those of the rows that a teacher with another tokenizer has too; ``None`` for all."""
        if TEACHER_POSITIONS not in inputs:
            return None
        return counted_rows(inputs, is_language_model=self.student.scale is not None)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Fetch the micro-batches of a step, and refuse to begin with one in which nothing counts.

        Later steps without a row that counts change nothing.

        Raises:
            ValueError: All labels of the first step are ignored.
        """
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        count: Any = num_items if self.teacher is None else self.num_taught
        if self.state.global_step == 0 and num_items is not None and batches and not int(count):
            raise ValueError(
                "in the first step no position counts: every label is ignored, is padding, or has no "
                "counterpart in the teacher's tokens; look at the data, or give a larger --batch-size"
            )
        return batches, num_items

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """Count the rows of all micro-batches and processes, by the rule that the loss goes by.

        Those that the teacher has are noted beside.
        """
        counts = []
        for batch in batch_samples:
            rows, taught = self._rows(batch), self._taught(batch)
            count = len(batch["labels"]) if rows is None else len(rows)
            counts.append([count, count if taught is None else len(taught)])
        total: Any = torch.tensor(counts, dtype=torch.long, device=device).view(-1, 2).sum(0)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.reduce(total)
        num_items, self.num_taught = total.unbind()
        return num_items

    def _note(self, loss: Tensor, parts: dict[str, Tensor]) -> None:
        """Add up what will be logged, without waiting for the device."""
        finite = torch.isfinite(loss.detach())
        self.is_finite = finite if self.is_finite is None else self.is_finite & finite
        for name in PARTS:
            if name in parts:
                self.sums[name] = self.sums.get(name, 0) + parts[name].detach()
        self.num_batches += 1

    def check_finite(self) -> None:
        """Stop at a loss that is none; called before anything is logged or saved.

        Raises:
            NonFiniteLossError: There was one since the last call.
        """
        finite, self.is_finite = self.is_finite, None
        if finite is not None and not bool(finite):
            raise NonFiniteLossError(
                f"the loss became NaN or infinite before step {self.state.global_step}: the teacher says "
                "NaN, or the learning rate is too high; the last checkpoint is from before"
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss and lambda, means since the last log."""
        if "loss" in logs:
            self.check_finite()
            is_averaged = self.args.average_tokens_across_devices
            for name, total in self.sums.items():
                mean: Any = self.accelerator.reduce(total.float(), "mean")
                if name == "expert_load":
                    logs[name] = float(mean) / max(self.num_batches, 1)
                elif name == "alignment_factor":  # once a step, the same in every process
                    logs[name] = float(mean) / max(self.num_steps, 1)
                else:  # whose micro-batches add up to a step
                    processes = self.accelerator.num_processes if is_averaged else 1
                    logs[name] = float(mean) * processes / max(self.num_steps, 1)
            self.sums, self.num_batches, self.num_steps = {}, 0, 0
        super().log(logs, start_time)

    def finish_step(self) -> None:
        """Let the alignment add up what the micro-batches said, and end the first phase when it is over."""
        self.num_steps += 1
        if (alignment := self.student.alignment) is not None:
            alignment.finish_step()
            if self.teacher is not None:
                self.sums["alignment_factor"] = self.sums.get("alignment_factor", 0) + alignment.factor.detach()
        self.stop_when_due()

    def stop_when_due(self) -> None:
        """Begin the second phase if its epoch has come."""
        if self._is_over(self.state):
            self.stop_distilling()

    def _is_over(self, state: TrainerState) -> bool:
        return self.stop_epoch is not None and (state.epoch or 0) >= self.stop_epoch

    def stop_distilling(self) -> None:
        """Drop the teacher and, where nothing divides or watches it, the auxiliary head from memory."""
        self.teacher = None
        student = self.student
        if not isinstance(student.student, DualHeadStudent) or self.is_divided:
            return
        if self.args.world_size == 1:
            head = list(student.student.auxiliary_head.parameters())
            student.drop_auxiliary_head()
            if self.optimizer is not None:
                _forget(self.optimizer, head)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.check_finite()
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the plain model's checkpoint and, beside it, what training needs to go on."""
        if not self.args.should_save:
            return
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        student = self.student
        prefix = "student.model." if isinstance(student.student, DualHeadStudent) else "student."
        own = None
        if state_dict is not None:
            tied = {prefix + key for key in student.plain.all_tied_weights_keys}  # copies, once gathered
            own = {
                key[len(prefix) :]: value
                for key, value in state_dict.items()
                if key.startswith(prefix) and key not in tied
            }
        save_checkpoint(student.plain, folder, state_dict=own)
        if isinstance(student.student, DualHeadStudent) and not self.is_divided:
            student.student.save_auxiliary_head(folder)
        if student.alignment is not None and not self.is_divided:
            save_file(student.alignment.state_dict(), folder / ALIGNMENT_FILE)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)  # pyright: ignore[reportAttributeAccessIssue]
        torch.save(self.args, folder / TRAINING_ARGS_NAME)  # as Trainer does; nothing here reads it

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_divided:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        folder, student = Path(resume_from_checkpoint), self.student
        reload_weights(student.plain, folder)
        if isinstance(student.student, DualHeadStudent):
            names = [SPEC_FILE, HEAD_FILE] + ([] if student.alignment is None else [ALIGNMENT_FILE])
            missing = [name for name in names if not (folder / name).is_file()]
            if missing == names and self._is_over(
                TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
            ):
                self.stop_distilling()
                return
            if missing:
                raise ValueError(
                    f"checkpoint '{folder}' lacks {missing[0]}; remove the checkpoint, and the same command "
                    "goes on from the one before"
                )
            student.student.load_auxiliary_head(folder)
        if student.alignment is not None:
            student.alignment.load_state_dict(load_file(folder / ALIGNMENT_FILE))


def check_alignment(where: str, arguments: TrainingArguments) -> None:
    """Refuse to align by the gradients of parameters where no process has them whole.

    Args:
        where: Of the alignment.
        arguments: Of the training.

    Raises:
        ValueError: Says what there is, and to align at the features.
    """
    parts = arguments.gradient_accumulation_steps
    if where != "features" and (arguments.world_size > 1 or parts > 1):
        raise ValueError(
            f"gradients can be aligned over parameters ({where}) only where one process has the whole batch "
            f"at once; here are {arguments.world_size} processes and {parts} micro-batches: align at the "
            "features"
        )


class _StepEnd(TrainerCallback):
    def __init__(self, trainer: DistillTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See whether a resumed run is in its second phase."""
        self.trainer.stop_when_due()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Pass it on."""
        self.trainer.finish_step()


def _forget(optimizer: Any, parameters: Sequence[nn.Parameter]) -> None:
    """Take parameters and their moments out of an optimizer."""
    gone = {id(parameter) for parameter in parameters}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in gone]
    for parameter in parameters:
        optimizer.state.pop(parameter, None)
