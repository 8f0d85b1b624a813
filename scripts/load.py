"""Load a model from a folder or the hub, after every check that is possible without loading it."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..moe.checkpoint import METHOD, rebuild_layer
from ..moe.discovery import UnsupportedModelError, expert_layers
from .checkpoint_files import check_folder, files_fingerprint
from .console import is_interactive

__all__ = ["ModelSource", "UnsupportedModelError", "load_model", "load_tokenizer", "open_source", "skeleton"]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.tiktoken", "*.jinja"]
OTHER_FORMATS = ["consolidated*", "*/*"]
VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "tekken.json", "*.tiktoken")
SCAN_ELEMENTS = 2**24
"""Weights that are looked at together for NaN."""
DEQUANTISED = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}
"""Quantised checkpoints that transformers can turn into ordinary weights while loading."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A checkpoint that has passed every check short of loading it."""

    name: str
    """As the user wrote it: a folder or a hub id."""
    folder: Path
    """Where its files are."""
    config: PreTrainedConfig

    @property
    def fingerprint(self) -> str:
        """Changes when a file of the checkpoint does."""
        return files_fingerprint(self.folder)


def open_source(model: str) -> ModelSource:
    """Find a checkpoint and check everything that its files tell, weights not yet read.

    Args:
        model: Folder or hub id; a hub id's files are downloaded.

    Raises:
        ValueError: It does not exist, is not whole, is pickled, quantised in a way that cannot be undone, or
            has no experts (`UnsupportedModelError`); says what and what to do.
    """
    if not is_interactive():
        transformers.utils.logging.disable_progress_bar()
    folder = _find(model)
    check_folder(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(
            f"transformers {transformers.__version__} cannot read the config of '{model}': {error}"
        ) from error
    method = _quantisation(config)
    if method not in (None, METHOD, *DEQUANTISED):
        raise ValueError(
            f"'{model}' is quantised ({method}), and quantised experts cannot be merged; start from the "
            "checkpoint in float32 or bfloat16"
        )
    source = ModelSource(model, folder, config)
    expert_layers(skeleton(source))
    return source


def load_model(
    model: str | ModelSource, *, dtype: str = "auto", device: str | None = None
) -> PreTrainedModel:
    """Load a checkpoint with the class that it names, in evaluation mode.

    Args:
        model: Folder, hub id, or what `open_source` gave.
        dtype: ``auto`` (the checkpoint's own), ``float32`` or ``bfloat16``.
        device: None is the accelerator, if there is one, else the CPU.

    Raises:
        ValueError: What `open_source` refuses, tensors that the checkpoint lacks, NaN or infinity.
    """
    source = open_source(model) if isinstance(model, str) else model
    arguments: dict[str, Any] = {}
    if (method := _quantisation(source.config)) in DEQUANTISED:
        arguments["quantization_config"] = getattr(transformers, DEQUANTISED[method])(dequantize=True)
    with _quietly():
        loaded, info = model_class(source.config).from_pretrained(
            source.folder,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **arguments,
        )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"the weights of '{source.name}' lack {len(missing)} tensors that {type(loaded).__name__} needs, "
            f"{missing[0]!r} the first: config and weights do not belong together, or a file is incomplete"
        )
    if arguments:
        # What was remembered of the quantised layout would be written into the plain weights' names.
        loaded.__dict__.pop("_weight_conversions", None)
    loaded = loaded.to(_device(device)).eval()
    check_finite(loaded, source.name)
    return loaded


def load_tokenizer(model: str | ModelSource) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint.

    Raises:
        ValueError: There is none that can be read.
    """
    folder = _find(model) if isinstance(model, str) else model.folder
    # Without any of them transformers 5 makes up an empty tokenizer and says nothing.
    if not any(next(folder.glob(pattern), None) for pattern in VOCABULARIES):
        raise ValueError(f"'{folder}' has no tokenizer: none of {', '.join(VOCABULARIES)} is there")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # Tokenizer libraries raise whatever they like at a missing or damaged file; all mean the same here.
    except Exception as error:
        raise ValueError(f"'{folder}' has no tokenizer that can be loaded: {error}") from error


def skeleton(source: ModelSource) -> PreTrainedModel:
    """Build a checkpoint's model on the meta device: all shapes and types, no weights, any size at once."""
    dtype = source.config.dtype or torch.float32
    with torch.device("meta"), _quietly():
        model = model_class(source.config)._from_config(source.config, dtype=dtype)
    if _quantisation(source.config) == METHOD:
        layers = {layer.name: layer for layer in expert_layers(model)}
        for name, entry in _quantisation_table(source.config)["layers"].items():
            if name not in layers:
                raise ValueError(
                    f"the config of '{source.name}' names layer {name!r}, which the model has not"
                )
            rebuild_layer(layers[name], entry)
    return model.eval()


def model_class(config: PreTrainedConfig) -> Any:
    """The transformers class that a config names, if it has a head; else what its kind suggests.

    Only names of transformers' own models are looked up, never code that comes with a checkpoint.
    """
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel) and found.can_generate():
            return found
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    if type(config) not in kind._model_mapping:
        raise ValueError(f"model type {config.model_type!r} is not a language model that generates text")
    return kind._model_mapping[type(config)]


@torch.no_grad()
def check_finite(model: PreTrainedModel, name: str) -> None:
    """Refuse weights that hold NaN or infinity.

    Raises:
        ValueError: Names the first such tensor.
    """
    for tensor_name, tensor in model.named_parameters():
        for part in tensor.view(-1).split(SCAN_ELEMENTS) if tensor.is_contiguous() else [tensor]:
            if not part.isfinite().all():
                raise ValueError(
                    f"tensor {tensor_name!r} of '{name}' holds NaN or infinity: the checkpoint is damaged, "
                    f"or overflowed when it was saved as {tensor.dtype}; download it again"
                )


def _find(model: str) -> Path:
    """The folder of a checkpoint's files."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ValueError(f"'{model}' is a file; give the folder of the checkpoint that it belongs to")
    if not HUB_ID.fullmatch(model):
        raise ValueError(
            f"'{model}' does not exist: there is no such folder, and a hub id looks like owner/name"
        )
    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES, ignore_patterns=OTHER_FORMATS))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"'{model}' is not a folder here and cannot be downloaded from the hub: {reason}"
        ) from error


def _quantisation(config: PreTrainedConfig) -> str | None:
    return _quantisation_table(config).get("quant_method")


def _quantisation_table(config: PreTrainedConfig) -> dict[str, Any]:
    table = getattr(config, "quantization_config", None) or {}
    return table if isinstance(table, dict) else table.to_dict()


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    # A device that is unknown, not compiled in or not there; torch has several exceptions for it.
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used: {str(error).partition(chr(10))[0]}") from error
    return device


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence the loading report of transformers; what matters in it is checked and raised."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
