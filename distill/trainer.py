"""The Trainer of students: Transformers' own, with another loss."""

# B batch, S sequence, N rows that count

import logging
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
from .auxiliary_head import has_batch_norm
from .counted import TEACHER_POSITIONS, counted_rows, labelled_rows
from .dual_head import HEAD_FILE, SPEC_FILE, DualHeadStudent
from .losses import ValidRows, masked_mean
from .student import StudentInTraining
from .teachers import Teacher, model_inputs
from .trainer_checks import check_alignment, check_sharded_heads, check_stop_epoch

logger = logging.getLogger(__name__)

ALIGNMENT_FILE = "gradient_alignment.safetensors"
ROWS = "counted_rows"
"""Key of a training batch: which of its rows count, and which of those the teacher has; found once."""
OWN_ARGUMENTS = ("remove_unused_columns", "label_names", "logging_nan_inf_filter")
"""TrainingArguments that `DistillTrainer` sets itself."""
SYNCHRONISED = ("cuda", "xpu", "hpu")
"""Devices of which torch can take batch statistics over several processes."""
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
            head with it. Nothing else may hold the teacher, or it stays in memory.
        **kwargs: As for Trainer. Of its arguments, ``remove_unused_columns`` and ``logging_nan_inf_filter``
            are switched off.

    Raises:
        ValueError: An alignment over parameters that several processes or micro-batches share, ZeRO-3,
            several GPUs in one process, other ``label_names``, or a `stop_epoch` that does not come.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self, *args: Any, teacher: Teacher | None, stop_epoch: float | None = None, **kwargs: Any
    ) -> None:
        arguments: TrainingArguments = kwargs["args"]
        if arguments.label_names not in (None, ["labels"]):
            raise ValueError(
                f"label_names={arguments.label_names}: distillation reads 'labels'; leave label_names out of "
                "the training arguments, and name the column so"
            )
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
        check_sharded_heads(self.args)
        for name in ("label_smoothing_factor", "torch_compile"):
            if getattr(self.args, name):
                raise ValueError(
                    f"distillation has no use for {name}; leave it out of the training arguments"
                )
        check_one_gpu(self.args, "distillation")
        if self.student.alignment is not None:
            check_alignment(self.student.alignment.where, self.args)
        if self.stop_epoch is not None and hasattr(self.train_dataset, "__len__"):
            check_stop_epoch(self.stop_epoch, self.args, len(self.train_dataset))  # pyright: ignore
        if isinstance(self.student.student, DualHeadStudent):
            self._share_batch_statistics(self.student.student)

    def _share_batch_statistics(self, student: DualHeadStudent) -> None:
        """Take BatchNorm's statistics over all processes if that can be, and say where they are of less."""
        if not has_batch_norm(student.auxiliary_head):
            return
        processes, parts = self.args.world_size, self.args.gradient_accumulation_steps
        if processes > 1 and self.args.device.type in SYNCHRONISED:
            student.share_batch_statistics()
            processes = 1
        if max(processes, parts) > 1 and self.args.process_index == 0:
            logger.warning(
                "the second head's BatchNorm takes its statistics of one micro-batch of one process, and a "
                "step has %d x %d, so the loss depends on how a batch is cut; norm='rms' "
                "(--auxiliary-norm rms) does not",
                parts,
                processes,
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the recipe's loss in training, and the plain model's cross-entropy in evaluation."""
        rows, taught = inputs.pop(ROWS) if ROWS in inputs else self._counted(inputs)
        labels = inputs["labels"] if rows is None else rows.labels
        if not model.training:
            return self._evaluate_batch(model, inputs, labels, rows, return_outputs)
        student = self.student
        if student.alignment is not None:
            student.alignment.begin_step(self.state.global_step, self.current_gradient_accumulation_steps)
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
            loss = masked_mean(nn.functional.cross_entropy(logits.float(), labels_N, reduction="none"))
        return (loss, outputs) if return_outputs else loss

    def _counted(self, inputs: Mapping[str, Any]) -> tuple[ValidRows | None, ValidRows | None]:
        """The rows that count; and those that a teacher with another tokenizer has too, ``None`` for all."""
        is_language_model = self.student.scale is not None
        rows = labelled_rows(inputs, is_language_model=is_language_model)
        if TEACHER_POSITIONS not in inputs:
            return rows, None
        return rows, counted_rows(inputs, is_language_model=is_language_model)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Fetch the micro-batches of a step, and refuse one in which nothing counts.

        Its gradient would be 0, and AdamW would still move the weights by what it remembers.

        Raises:
            ValueError: All labels of the step are ignored.
        """
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        count: Any = num_items if self.teacher is None else self.num_taught
        if num_items is not None and batches and not int(count):
            raise ValueError(
                f"in step {self.state.global_step + 1} no position counts: every label is ignored, is "
                "padding, or has no counterpart in the teacher's tokens; leave such examples out, or give a "
                "larger --batch-size"
            )
        return batches, num_items

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """Count the rows of all micro-batches and processes, by the rule that the loss goes by.

        Those that the teacher has are noted beside.
        """
        counts = []
        for batch in batch_samples:
            rows, taught = batch[ROWS] = self._counted(batch)
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
        """Let the alignment add up what the micro-batches said, and end the first phase when it is over.

        Raises:
            NonFiniteLossError: The loss of the step is none.
        """
        self.check_finite()
        self.num_steps += 1
        if (alignment := self.student.alignment) is not None:
            alignment.finish_step()
            if self.teacher is not None:
                self.sums["alignment_factor"] = (
                    self.sums.get("alignment_factor", 0) + alignment.factor.detach()
                )
        self.stop_when_due()

    def stop_when_due(self) -> None:
        """Begin the second phase if its epoch has come."""
        if _is_over(self.state, self.stop_epoch):
            self.stop_distilling()

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
            lost = lost_file(folder, is_aligned=student.alignment is not None, stop_epoch=self.stop_epoch)
            if lost is not None:
                raise ValueError(
                    f"checkpoint '{folder}' lacks {lost}; remove the checkpoint, and the same command goes "
                    "on from the one before"
                )
            if not (folder / HEAD_FILE).is_file():
                self.stop_distilling()
                return
            student.student.load_auxiliary_head(folder)
        if student.alignment is not None:
            student.alignment.load_state_dict(load_file(folder / ALIGNMENT_FILE))


def lost_file(checkpoint: Path, *, is_aligned: bool, stop_epoch: float | None) -> str | None:
    """Name a file of the second head that a checkpoint should have and lacks; ``None`` if it is whole.

    Args:
        checkpoint: Of a student with two heads, which nothing divides.
        is_aligned: Whether the run aligns gradients.
        stop_epoch: After which a checkpoint may have no second head at all.
    """
    names = [SPEC_FILE, HEAD_FILE] + ([ALIGNMENT_FILE] if is_aligned else [])
    missing = [name for name in names if not (checkpoint / name).is_file()]
    if not missing:
        return None
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    return None if missing == names and _is_over(state, stop_epoch) else missing[0]


def _is_over(state: TrainerState, stop_epoch: float | None) -> bool:
    """Whether the first phase is."""
    return stop_epoch is not None and (state.epoch or 0) >= stop_epoch


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
