"""The trained model in the form that was asked for, whole on the disk."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..moe import ActiveExpertsCallback, save_checkpoint, smoe_layers, to_dense, to_stock
from ..moe.checkpoint import write_config_aliases
from ..moe.dropout.load import ExpertLoadCallback
from ..moe.dropout.stock import width_caveat
from .slimming_curve import summarise
from .train_model import whole_tensors
from .train_prepare import TrainJob
from .training_job import TrainingJob
from .verify import VerificationError

LEGAL = ("LICENSE*", "NOTICE*")
"""Files of the original that stay with what is made of its weights."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    model_class: str
    metrics: dict[str, float] = field(default_factory=dict)
    """Quality of a form that is not exactly the model that was trained."""
    caveats: tuple[str, ...] = ()
    """What its users must know."""


def check_export(job: TrainJob, trainer: Any, model: PreTrainedModel) -> None:
    """Refuse before the training what could not be saved after it.

    Raises:
        ValueError: The form cannot be had of this model, or not of one in parts on several processes.
    """
    if trainer.is_divided:
        if job.schedule is not None and job.form != "moekit":
            raise ValueError(
                f"--form {job.form} needs the whole model in one process; train with --form moekit and "
                f"convert the result with moekit.moe.to_{job.form}"
            )
        check_gathering(trainer)
    elif job.form == "stock":
        to_stock(model)


def check_gathering(trainer: Any) -> None:
    """Refuse DeepSpeed ZeRO-3 without what lets a model be saved.

    Raises:
        ValueError: Names the setting.
    """
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    zero = {} if plugin is None else plugin.deepspeed_config.get("zero_optimization", {})
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise ValueError(
            "DeepSpeed ZeRO-3 needs zero3_save_16bit_model: true (in JSON "
            "stage3_gather_16bit_weights_on_model_save), or the trained model could not be saved"
        )


def export(job: TrainJob, trainer: Any, output: Path) -> Exported:
    """Write model, config and tokenizer; every process has to call it.

    Raises:
        VerificationError: What was written is not what was in memory.
    """
    if trainer.is_divided:
        model_class = save_sharded(trainer, output)
        save_beside(job, output)
        return Exported(model_class)
    model, metrics = trainer.accelerator.unwrap_model(trainer.model), {}
    caveat = None
    if job.schedule is not None and job.form == "dense":
        metrics = _densify(job, trainer, model)
    elif job.form == "stock":
        caveat = width_caveat(next(iter(smoe_layers(model).values())))
        model = to_stock(model)
    if job.is_main:
        if job.form == "moekit":
            save_checkpoint(model, output, max_shard_size=job.options.max_shard_size)
        else:
            model.save_pretrained(output, max_shard_size=job.options.max_shard_size)
            write_config_aliases(output / "config.json")
        verify_saved(model, output)
        save_beside(job, output)
    return Exported(type(model).__name__, metrics, () if caveat is None else (caveat,))


def save_sharded(trainer: Any, output: Path) -> str:
    """Gather a model that is in parts, and write it; every process has to call it.

    Returns:
        The name of its class.
    """
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(output))
    (output / "training_args.bin").unlink(missing_ok=True)
    if trainer.args.process_index == 0:
        write_config_aliases(output / "config.json")
    return type(trainer.accelerator.unwrap_model(trainer.model)).__name__


def _densify(job: TrainJob, trainer: Any, model: PreTrainedModel) -> dict[str, float]:
    """Turn the model into the dense one, and evaluate that."""
    device = job.arguments.device
    batches = job.examples.calibration_batches(job.options.batch_size)
    to_dense(model, [{key: value.to(device) for key, value in batch.items()} for batch in batches])
    for callback in (ActiveExpertsCallback, ExpertLoadCallback):
        trainer.remove_callback(callback)
    found = trainer.evaluate(metric_key_prefix="eval_dense")
    return {name: found[f"eval_dense_{name}"] for name in summarise([[0.0, 0.0, 0.0]])}


def save_beside(job: TrainingJob, output: Path) -> None:
    """The tokenizer, and the licence of what the model was made of."""
    if not job.is_main:
        return
    job.processor.save_pretrained(output)
    if job.start != "scratch":
        copy_legal(job.source.folder, output)


def copy_legal(folder: Path, output: Path) -> None:
    """Licences and notices go where the weights go."""
    for path in sorted({path for pattern in LEGAL for path in folder.glob(pattern)}):
        shutil.copyfile(path, output / path.name)


def verify_saved(model: PreTrainedModel, folder: Path) -> None:
    """Read the model back as its users will.

    Raises:
        VerificationError: A tensor is not what it is in memory.
    """
    dtype: Any = model.dtype
    with whole_tensors():  # DeepSpeed ZeRO-3 would wait for the other processes
        reloaded = type(model).from_pretrained(folder, dtype=dtype, use_safetensors=True)
    mine, theirs = model.state_dict(), reloaded.state_dict()
    for name in sorted(mine.keys() | theirs.keys()):
        if name not in mine or name not in theirs or not torch.equal(mine[name].cpu(), theirs[name].cpu()):
            raise VerificationError(
                f"tensor {name!r} was changed or lost by writing and reading the model; this is a fault of "
                "moekit, please report it"
            )
