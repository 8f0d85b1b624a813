"""`moekit train`: from a config or a dense model to a trained, self-slimmable one, with its curve."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback

from ..moe import ActiveExpertsCallback, DropoutTrainer, add_ffn_dropout, set_active_experts, smoe_layers
from ..moe.dropout.center import center_routers
from ..moe.dropout.ffn_activations import coactivation_partitions
from ..moe.dropout.load import ExpertLoadCallback
from ..moe.evaluating import evaluating
from .options import TrainOptions
from .slimming_curve import SlimmingCurve, curve_table, measure_curve, summarise
from .train_arguments import check_sharding
from .train_checkpoints import whole_checkpoints
from .train_data import row_metrics
from .train_export import check_export, export
from .train_model import build_model, convert, convert_analytically, empty_twin, resolve_combine
from .train_prepare import TrainJob, prepare_training
from .train_progress import TrainingLines
from .train_record import TrainRun, find_training_warnings, write_training_records
from .training_run import carry_out, fit, say

logger = logging.getLogger(__name__)


def run(options: TrainOptions) -> Path:
    """Train, or go on with the training that the same options began.

    Args:
        options: What to do.

    Returns:
        The folder that was made.

    Raises:
        ValueError: Something that was asked for cannot be, in almost all cases before any work.
        DiskFullError: There is no room for the result.
    """
    return carry_out(prepare_training(options), _train, lambda finished: curve_table(finished.curve))


def _train(job: TrainJob, output: Path) -> TrainRun:
    """Do the work; every process comes through here."""
    checkpoints = whole_checkpoints(job)
    say(job, f"Training on {len(job.examples.train):,} examples, {job.arguments.world_size} process(es)")
    model = _make_model(job, is_resumed=bool(checkpoints))
    use_cache = getattr(model.config, "use_cache", None)
    trainer = _make_trainer(job, model)
    fit(job, trainer, checkpoints)
    curve = _measure(job, trainer)
    if use_cache is not None:
        model.config.use_cache = use_cache  # which Trainer turns off
    history = list(trainer.state.log_history)
    exported = export(job, trainer, output)
    finished = TrainRun(
        job=job,
        model_class=exported.model_class,
        curve=curve,
        history=history,
        steps=trainer.state.global_step,
        form_metrics=exported.metrics,
        warnings=(*find_training_warnings(job, curve), *exported.caveats),
    )
    if job.is_main:
        write_training_records(finished, output)
    return finished


def _make_model(job: TrainJob, *, is_resumed: bool) -> Any:
    """The model to train, converted; what a checkpoint will overwrite is not computed again."""
    options = job.options
    say(job, f"{'Building' if job.start == 'scratch' else 'Loading'} {job.source.name}")
    model: Any = build_model(job.source, job.config, job.task, start=job.start, seed=options.seed)
    if job.schedule is None:
        add_ffn_dropout(model, options.ffn_dropout)
        return model
    device = job.arguments.device
    if job.start != "continue":
        model = _convert(job, model, is_resumed=is_resumed)
    if options.center_routers and not is_resumed:
        set_active_experts(model, job.schedule.k_start)
        center_routers(model.to(device), _calibration(job, device))
    set_active_experts(model, job.schedule.k_end)
    return model


def _convert(job: TrainJob, model: Any, *, is_resumed: bool) -> Any:
    """Carve or copy the FFNs; what a checkpoint will overwrite is not computed again."""
    options, device = job.options, job.arguments.device
    if options.router == "analytic" and not is_resumed:
        say(job, "Finding the neurons that are always active, and those that speak for the others")
        return convert_analytically(model.to(device), options, _calibration(job, device))
    partition: Any = "contiguous" if is_resumed else options.partition
    if partition == "coactivation":
        assert job.schedule is not None
        say(job, "Grouping neurons that are active together")
        partition = coactivation_partitions(
            model.to(device),
            _calibration(job, device),
            job.schedule.num_experts,
            seed=options.seed,
            layers=options.layers or None,
        )
    is_near = job.start == "carve" and resolve_combine(options, job.start) == "softmax" and not is_resumed
    batch = _calibration(job, device)[0] if is_near else {}
    before = _logits(model.to(device), batch) if is_near else None
    model = convert(model, options, start=job.start, partition=partition)
    if before is not None:
        difference = float((_logits(model, batch) - before).abs().max() / before.abs().max())
        say(
            job,
            f"With all experts active, softmax weights change the logits by up to {difference:.1%} of the "
            "largest (--combine uniform: not at all)",
        )
    return model


def _logits(model: PreTrainedModel, batch: dict[str, Any]) -> Tensor:
    with evaluating(model):
        return model(**batch).logits.float()


def _calibration(job: TrainJob, device: torch.device) -> list[dict[str, Any]]:
    batches = job.examples.calibration_batches(job.options.batch_size)
    return [{key: value.to(device) for key, value in batch.items()} for batch in batches]


def _make_trainer(job: TrainJob, model: PreTrainedModel) -> Any:
    options = job.options
    factors = {"load_balance": options.load_balance, "consistency": options.consistency}
    trainer: Any = DropoutTrainer(
        model=model,
        args=job.arguments,
        train_dataset=job.examples.train,
        eval_dataset=job.examples.held_out,
        data_collator=job.examples.collator,
        processing_class=job.processor,
        preprocess_logits_for_metrics=partial(row_metrics, shift=job.task == "causal-lm"),
        compute_metrics=lambda found: summarise(found.predictions),
        callbacks=[TrainingLines()],
        **{name: factor for name, factor in factors.items() if factor is not None},
    )
    trainer.remove_callback(PrinterCallback)
    if job.schedule is not None:
        # First, so that trackers hear what they add to the logs.
        callbacks = trainer.callback_handler.callbacks
        callbacks[:0] = [ActiveExpertsCallback(job.schedule), ExpertLoadCallback()]
    check_sharding(trainer.accelerator.distributed_type)
    check_export(job, trainer, model)
    return trainer


def _measure(job: TrainJob, trainer: Any) -> SlimmingCurve:
    twin: Any = None
    if not trainer.is_divided:
        trainer.model.to(job.arguments.device)
    if not trainer.is_divided and job.schedule is not None:
        twin = empty_twin(job.config, job.task)
        twin.to(job.arguments.device)
    fewest = max((layer.min_active_experts for layer in smoe_layers(trainer.model).values()), default=1)
    return measure_curve(
        trainer,
        tuple(k for k in job.eval_experts if k >= fewest),
        job.examples.speed_batch(job.options.batch_size),
        task=job.task,
        unit=job.examples.unit,
        k_trained=None if job.schedule is None else (job.schedule.k_start, job.schedule.k_end),
        expert_share=job.expert_share,
        dense=twin,
        say=partial(say, job),
    )
