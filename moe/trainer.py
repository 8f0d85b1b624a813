"""A remedy for transformers' Trainer, which loses the experts when it reads a checkpoint back.

``save_pretrained`` writes one tensor for each expert; the module in memory holds them fused. Trainer 5.23
reads the file with ``load_state_dict(..., strict=False)``, so no expert key matches: after a resume, or with
``load_best_model_at_end``, every expert (in Mixtral the router too) silently keeps the values it had before.
https://github.com/huggingface/transformers/issues/48805
"""

from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .finite import check_weights


def reload_weights(model: PreTrainedModel, checkpoint: str | Path) -> None:
    """Copies the weights of a checkpoint into a model, exactly and completely, in place.

    ``from_pretrained`` reads the checkpoint, because it knows how to fuse experts, and both forms that moekit
    writes. A second copy of the model is in memory meanwhile.

    Args:
        model: Of the class and the shapes that were saved; keeps its own dtypes and devices.
        checkpoint: A folder that ``save_pretrained`` wrote in safetensors.

    Raises:
        ValueError: The checkpoint lacks a weight of the model, or has other tensors or shapes.
    """
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    loaded: Any = type(model).from_pretrained(
        checkpoint,
        # The widest of the model's dtypes: a router kept in float32 must not pass through bfloat16.
        dtype=reduce(torch.promote_types, dtypes),
        attn_implementation="eager",
        use_safetensors=True,
        output_loading_info=True,
    )
    saved, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"checkpoint '{checkpoint}' lacks {len(missing)} weights of the model, such as '{missing[0]}'"
        )
    try:
        model.load_state_dict(saved.state_dict(), strict=True)
    except RuntimeError as error:
        raise ValueError(f"checkpoint '{checkpoint}' is of another model: {error}") from error


class ExpertSafeCheckpoints(Trainer):
    """Makes any Trainer restore the experts, on resume and for ``load_best_model_at_end``.

    A mixin; it goes first: ``class MySFTTrainer(ExpertSafeCheckpoints, SFTTrainer)``. PEFT models, FSDP and
    DeepSpeed have their own kinds of checkpoint and are left to the Trainer.
    """

    @property
    def plain_model(self) -> Any:
        """The model without what wraps it."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def is_divided(self) -> bool:
        """Whether FSDP or DeepSpeed keeps the state."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if (target := self._reloadable(resume_from_checkpoint, model)) is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            reload_weights(target, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        checkpoint = self.state.best_model_checkpoint
        if checkpoint is None or (target := self._reloadable(checkpoint)) is None:
            super()._load_best_model()
        else:
            reload_weights(target, checkpoint)

    def _reloadable(self, checkpoint: str, model: nn.Module | None = None) -> PreTrainedModel | None:
        """Returns the model to fill, or None where the Trainer's own way is right (or its error message)."""
        folder = Path(checkpoint)
        complete = (folder / CONFIG_NAME).is_file() and any(
            (folder / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
        )
        target = (
            self.plain_model
            if model is None
            else self.accelerator.unwrap_model(model, keep_torch_compile=False)
        )
        return target if complete and not self.is_divided and isinstance(target, PreTrainedModel) else None


class MoETrainer(ExpertSafeCheckpoints, Trainer):
    """HF Trainer for models with experts: a resumed run equals an uninterrupted one, bit for bit.

    Weights that have become NaN or infinite are never saved; see `check_weights`.
    """

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, also after an evaluation, which leaves a mark that would make accelerate leave out DDP.

        Raises:
            NonFiniteWeightsError: The weights are so at the end, or when a checkpoint was to be saved.
        """
        wrapped: Any = self.model_wrapped
        is_wrapped = any(isinstance(module, DistributedDataParallel) for module in wrapped.modules())
        if self.args.world_size > 1 and not self.is_divided and not is_wrapped:
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            vars(self.model).pop("_is_accelerate_prepared", None)
            self.model_wrapped = self.model
        found = super().train(*args, **kwargs)
        self.check_weights()
        return found

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.check_weights()
        super()._save_checkpoint(model, trial)

    def check_weights(self) -> None:
        """Refuse to go on with weights that are no numbers; every process calls it.

        Raises:
            NonFiniteWeightsError: Says when, and what to do.
        """
        check_weights(self.accelerator, self.model, self.state.global_step)  # pyright: ignore


def check_one_gpu(arguments: TrainingArguments, what: str) -> None:
    """Refuse several GPUs in one process, where a loss would be of a part of the batch.

    Args:
        arguments: Of the training.
        what: Begins the message.

    Raises:
        ValueError: Says how to start.
    """
    if arguments.n_gpu > 1:
        raise ValueError(
            f"{what} needs one process for each of {arguments.n_gpu} GPUs: start with torchrun or accelerate "
            "launch"
        )
