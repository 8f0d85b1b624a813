"""Load a model from a folder or the hub, after every check that is possible without loading it."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..moe.checkpoint import METHOD, MoekitConfig, rebuild_layers
from ..moe.discovery import UnsupportedModelError, expert_layers
from ..moe.router import EXPERT_COUNT_KEYS
from .checkpoint_files import check_folder, files_fingerprint, read_config, tensor_elements
from .console import is_interactive
from .quantised import DEQUANTISED, loading_arguments, quantisation, quantisation_table

__all__ = ["ModelSource", "UnsupportedModelError", "load_model", "load_tokenizer", "open_source", "skeleton"]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.tiktoken", "*.jinja", "LICENSE*", "NOTICE*"]
OTHER_FORMATS = ["consolidated*", "*/*"]
VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "tekken.json", "*.tiktoken")
SCAN_ELEMENTS = 2**24
"""Weights that are looked at together for NaN."""
LIMITS = {
    **dict.fromkeys(EXPERT_COUNT_KEYS, 100_000),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layers", "n_layer"), 10_000),
}
"""Largest counts of a config: to build a module for each of more would take for ever."""
SHOWN_FAULTS = 3
"""Tensors named in an error."""
SPARE_SHARE = 1.25
"""Elements that a model may have for each in its files; a few are computed, or shared and counted twice."""
REPORTED = re.compile(
    r"^(?:\x1b\[\d+m)?(.+?) +\| (?:\x1b\[\d+m)?(MISSING|MISMATCH|CONVERSION)"
    r"(?:.*ckpt: (?:torch.Size)?(\S.*) vs model: ?(?:torch.Size)?(\S.*\S))?",
    re.MULTILINE,
)
"""The faults in the loading report of transformers."""


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
    _check_counts(read_config(folder), model)
    with _explained(f"transformers {transformers.__version__} cannot read the config of '{model}'"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    method = quantisation(config)
    if method not in (None, METHOD, *DEQUANTISED):
        raise ValueError(
            f"'{model}' is quantised ({method}), and quantised experts cannot be merged; start from the "
            "checkpoint in float32 or bfloat16"
        )
    source = ModelSource(model, folder, config)
    _check_skeleton(source)
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
    arguments = loading_arguments(source.config)
    with _quietly() as report, _explained(f"the weights of '{source.name}' cannot be loaded", report):
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
    loaded = loaded.to(find_device(device)).eval()
    check_finite(loaded.named_parameters(), source.name)
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


def skeleton(source: ModelSource, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Build a checkpoint's model on the meta device: all shapes and types, no weights, any size at once.

    Args:
        source: The checkpoint.
        dtype: Of the weights; the checkpoint's own by default.

    Raises:
        ValueError: The config contradicts itself.
    """
    wanted: Any = dtype or source.config.dtype or torch.float32
    kind = model_class(source.config)
    with (
        torch.device("meta"),
        _quietly(),
        _explained(f"no model can be built from the config of '{source.name}'"),
    ):
        model = kind._from_config(source.config, dtype=wanted)
    if quantisation(source.config) == METHOD:
        with _explained(f"the quantization_config of '{source.name}' cannot be carried out"):
            _rebuild(model, quantisation_table(source.config))
    return model.eval()


def _rebuild(model: PreTrainedModel, table: dict[str, Any]) -> None:
    """Give a model the layers that a moekit checkpoint's table says."""
    if not isinstance(table.get("layers"), dict) or not (table["layers"] or table.get("smoe_dropout")):
        raise ValueError("'layers' is not a table with an entry for each compressed layer")
    if not table.get("smoe_dropout"):  # whose layers are not there yet
        names = [layer.name for layer in expert_layers(model)]
        if unknown := [name for name in table["layers"] if name not in names]:
            raise ValueError(f"it names layer {unknown[0]!r}, which is not among {', '.join(names)}")
    rebuild_layers(model, MoekitConfig(**table))


def model_class(config: PreTrainedConfig) -> Any:
    """The transformers class that a config names, if it has a head; else what its kind suggests.

    Only names of transformers' own models are looked up, never code that comes with a checkpoint.
    """
    names = config.architectures or ()
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"config.json says architectures={names!r}, which is not a list of class names")
    for name in names:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel) and found.can_generate():
            return found
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    if type(config) not in kind._model_mapping:
        raise ValueError(f"model type {config.model_type!r} is not a language model that generates text")
    return kind._model_mapping[type(config)]


@torch.no_grad()
def check_finite(
    tensors: Iterable[tuple[str, Tensor]], name: str, files: Mapping[str, Path] | None = None
) -> None:
    """Refuse weights that hold NaN or infinity.

    Args:
        tensors: With their names.
        name: Of the checkpoint.
        files: Where tensors are stored, to be named instead of the checkpoint.

    Raises:
        ValueError: Names the first such tensor.
    """
    for tensor_name, tensor in tensors:
        for part in tensor.view(-1).split(SCAN_ELEMENTS) if tensor.is_contiguous() else [tensor]:
            if not part.isfinite().all():
                place = (files or {}).get(tensor_name, name)
                raise ValueError(
                    f"tensor {tensor_name!r} of '{place}' holds NaN or infinity: the checkpoint is damaged, "
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


def _check_counts(table: dict[str, Any], name: str) -> None:
    """Refuse counts of experts and layers that are none, wherever in the config they are."""
    tables: list[Any] = [table]
    while tables:
        for key, value in tables.pop().items():
            # What moekit wrote into quantization_config is checked with the layers that it is about.
            if isinstance(value, dict) and key != "quantization_config":
                tables.append(value)
            # Some families count the experts of each layer, or of each modality.
            for count in value if isinstance(value, list) else [value]:
                if (
                    key in LIMITS
                    and count is not None
                    and not (type(count) is int and 0 <= count <= LIMITS[key])
                ):
                    raise ValueError(
                        f"the config of '{name}' says {key}={str(count)[:60]}; it must be a whole number "
                        f"from 0 to {LIMITS[key]:,}"
                    )


def _check_skeleton(source: ModelSource) -> None:
    """Refuse a config whose layers cannot run, or are far more than the weights in the files."""
    model = skeleton(source)
    for layer in expert_layers(model):
        if not 1 <= layer.top_k <= layer.num_experts:
            raise ValueError(
                f"the config of '{source.name}' gives each token {layer.top_k} of the {layer.num_experts} "
                f"experts of layer {layer.name!r}; it must be 1 to {layer.num_experts}"
            )
    needed, stored = sum(p.numel() for p in model.parameters()), tensor_elements(source.folder)
    # Packed weights count several to an element.
    if quantisation(source.config) not in DEQUANTISED and needed > SPARE_SHARE * stored:
        raise ValueError(
            f"the config of '{source.name}' describes {needed:,} parameters, but its files hold {stored:,}: "
            "config and weights do not belong together"
        )


def find_device(name: str | None) -> torch.device:
    """The named device, or the accelerator if there is one, else the CPU.

    Raises:
        ValueError: There is no such device here.
    """
    if name is None:
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    # A device that is unknown, not compiled in or not there; torch has several exceptions for it.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {name} cannot be used: {reason}; try --device cpu") from error
    return device


@contextmanager
def _quietly() -> Iterator[list[str]]:
    """Silence the loading report of transformers; what matters in it is checked and raised.

    Yields:
        What would have been said, filled as it comes.
    """
    logger, heard = logging.getLogger("transformers"), _Listener()
    level, handlers, propagates = logger.level, logger.handlers, logger.propagate
    heard.errors_to = handlers
    logger.handlers, logger.propagate = [heard], False
    logger.setLevel(logging.WARNING)
    try:
        yield heard.messages
    finally:
        logger.handlers, logger.propagate = handlers, propagates
        logger.setLevel(level)


class _Listener(logging.Handler):
    """Keeps messages, and passes on those of errors."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []
        self.errors_to: list[logging.Handler] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
        if record.levelno >= logging.ERROR:
            for handler in self.errors_to:
                handler.handle(record)


@contextmanager
def _explained(what: str, report: Sequence[str] = ()) -> Iterator[None]:
    """Turn whatever transformers raises at a damaged checkpoint into one ValueError.

    Args:
        what: Begins its message.
        report: What transformers said before it raised; the tensors in it are named.
    """
    try:
        yield
    except (UnsupportedModelError, torch.OutOfMemoryError):
        raise
    # Configs, their validators, models and safetensors raise what they like; all mean the same here.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if faults := REPORTED.findall("\n".join(report)):
            shown = ", ".join(_fault(*fault) for fault in faults[:SHOWN_FAULTS])
            more = f" and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
            reason = f"{shown}{more}; config and weights do not belong together, or a file is incomplete"
        raise ValueError(f"{what}: {reason}") from error


def _fault(name: str, kind: str, stored: str, needed: str) -> str:
    """What is wrong with a tensor of the loading report."""
    if kind == "MISSING":
        return f"{name!r} is missing"
    if not stored:
        return f"{name!r} is incomplete or has another shape"
    return f"{name!r} has the shape {stored} in the files and {needed} in the model"
