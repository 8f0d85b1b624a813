"""Healing within `moekit compress`: the compressed model learns from the original what it has lost."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PrinterCallback, default_data_collator

from ..distill import DistillationRecipe, DistillTrainer, StudentInTraining, train_only_routers
from ..distill.teachers import ModelTeacher
from .distill_options import DistillOptions
from .healing import Healing
from .load import load_model
from .prepare import Job
from .row_healing import RowHealingTrainer, row_pruner
from .train_arguments import training_arguments
from .train_checkpoints import remove_incomplete, whole_checkpoints
from .train_data import BlockRows, Examples
from .train_model import open_training_source
from .train_progress import TrainingLines
from .training_job import TrainingJob
from .training_run import fit

RECIPES = {
    # Router KD, arXiv:2603.02217: KL alone, at temperature 1.
    "router": DistillationRecipe(loss="kl", label_weight=0.0, temperature=1.0),
    # MC-SMoE, arXiv:2310.01334, section 3.2: CE + 0.2 KL at temperature 2.
    "kd": DistillationRecipe(loss="kl", weight=0.2, temperature=2.0),
}
SAVES = 10
"""Checkpoints of a healing, at most; so much of it is lost by an interruption."""


def heal(job: Job, model: PreTrainedModel, folder: Path, *, sparse_rows: float | None = None) -> Healing:
    """Train a compressed model, in place, on what the original says of the calibration text.

    Several processes train together, each on batches of its own. Weights are float32 meanwhile, and rounded
    to their own type in the end. A healing that was interrupted goes on from its last checkpoint, to the same
    weights.

    Args:
        job: What was asked for; the original is loaded again as the teacher.
        model: Compressed, in memory.
        folder: For checkpoints; the same for the same work.
        sparse_rows: Prune the rows of S to this share meanwhile.

    Raises:
        ValueError: The model's head cannot be read, or a loss is NaN.
    """
    mode, dtypes = job.options.heal, [parameter.dtype for parameter in model.parameters()]
    _cast(model, [torch.float32] * len(dtypes))
    trainable = train_only_routers(model) if mode == "router" else model.num_parameters()
    teacher = ModelTeacher(load_model(job.source, dtype=job.options.dtype, device=job.options.device))
    training = _training(job, folder)
    pruner = None
    if sparse_rows is not None:
        pruner = row_pruner(model, sparse_rows, training.arguments.max_steps)
    make: Any = DistillTrainer if pruner is None else partial(RowHealingTrainer, pruner=pruner)
    trainer = make(
        model=StudentInTraining(model.train(), RECIPES[mode]),
        args=training.arguments,
        train_dataset=training.examples.train,
        data_collator=training.examples.collator,
        processing_class=job.tokenizer,
        callbacks=[TrainingLines()],
        teacher=teacher,
    )
    trainer.remove_callback(PrinterCallback)
    use_cache = model.config.use_cache
    if job.processes.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        remove_incomplete(training)
    job.processes.wait()
    fit(training, trainer, whole_checkpoints(training))
    if pruner is not None:
        pruner.finish()
    model.config.use_cache = use_cache  # which Trainer turns off
    model.requires_grad_(True).eval()
    _cast(model, dtypes)
    return Healing(
        mode=mode,
        steps=trainer.state.global_step,
        trained_parameters=trainable,
        history=list(trainer.state.log_history),
    )


def _training(job: Job, folder: Path) -> TrainingJob:
    """The healing as a training of `moekit distill` would be."""
    options, blocks = job.options, job.texts.calibration
    steps = options.heal_steps or -(-len(blocks) // (options.batch_size * job.processes.count))
    # A warm-up begins with a step of rate 0, which of so few would be its only one.
    few: dict[str, Any] = {"warmup": 0.0} if steps * DistillOptions.warmup < 1 else {}
    given = DistillOptions(
        model=options.model,
        teacher=options.model,
        data=job.data,
        out=options.out,
        steps=steps,
        batch_size=options.batch_size,
        learning_rate=options.heal_learning_rate,
        **few,
        save_steps=max(1, -(-steps // SAVES)),
        logging_steps=max(1, steps // SAVES),
        seed=options.seed,
    )
    rows = BlockRows(blocks)
    source = open_training_source(options.model, allow_compressed=True)
    return TrainingJob(
        options=given,
        source=source,
        config=job.source.config,
        task="causal-lm",
        start="continue",
        processor=job.tokenizer,
        examples=Examples(
            train=rows,
            held_out=rows,
            collator=default_data_collator,
            train_fingerprint=blocks.fingerprint,
            fingerprint=blocks.fingerprint,
            unit="tokens",
        ),
        labels=(),
        arguments=training_arguments(given, folder, "continue", {}),
    )


def _cast(model: PreTrainedModel, dtypes: list[torch.dtype]) -> None:
    """Parameters alone: the rotary tables must not be rounded."""
    for parameter, dtype in zip(model.parameters(), dtypes, strict=True):
        parameter.data = parameter.data.to(dtype)
