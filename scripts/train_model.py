"""What a training begins with: a config or a checkpoint, and the model that training gets."""

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations import deepspeed

from ..distill import task_head
from ..moe import to_cmoe, to_smoe_dropout
from ..moe.checkpoint import METHOD, read_dropout_spec
from ..moe.dropout.build import DropoutSpec
from ..moe.dropout.router import LOGIT_STD
from .checkpoint_files import INDEX_FILE, PICKLED, SINGLE_FILE, check_folder, files_fingerprint, read_config
from .console import is_interactive, warn
from .load import (
    VOCABULARIES,
    _check_counts,
    _explained,
    _find,
    _quietly,
    _rebuild,
    check_finite,
    load_tokenizer,
)
from .options import TrainOptions
from .quantised import quantisation, quantisation_table

DEFAULT_EXPERTS = 16
LAYOUT = ("start", "router", "combine", "drop_fraction", "partition", "layers", "logit_std", "center_routers")
LAYOUT += ("shared_experts",)
"""Options that decide how a dense model is converted."""
TASKS = {
    "causal-lm": AutoModelForCausalLM,
    "classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "images": AutoModelForImageClassification,
}
"""Classes with a head for the task; ``images`` is classification of pictures."""
IMAGE_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
IN_A_LAYER = re.compile(r"\.\d+\.")
"""In the names of tensors of numbered layers, which a new head has not."""


@dataclass(frozen=True, slots=True)
class Source:
    """A config, with weights or without, that has passed every check of its files."""

    name: str
    """As the user wrote it."""
    folder: Path
    """Where its files are."""
    config: PreTrainedConfig
    has_weights: bool
    spec: DropoutSpec | None
    """Of the SMoE-Dropout layers that a checkpoint has already."""

    @property
    def fingerprint(self) -> str:
        """Changes when a file of the model does."""
        return files_fingerprint(self.folder)

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of a classifier's labels, in the order of their numbers."""
        known: Any = self.config.id2label
        return tuple(str(known[number]) for number in sorted(known))

    def has_processor(self, task: str) -> bool:
        """Whether a tokenizer is beside the model; for the task ``images`` an image processor."""
        patterns = IMAGE_PROCESSORS if task == "images" else VOCABULARIES
        return any(next(self.folder.glob(pattern), None) for pattern in patterns)


def open_training_source(name: str, *, allow_compressed: bool = False) -> Source:
    """Find a config or checkpoint and check its files.

    Args:
        name: A config.json, a folder or a hub id.
        allow_compressed: Take a compressed Mixture-of-Experts checkpoint, too. Whether a stock one can be
            used is for the caller to see.

    Raises:
        ValueError: It does not exist, is damaged, pickled or quantised, or is compressed and may not be.
    """
    if not is_interactive():
        transformers.utils.logging.disable_progress_bar()
    path = Path(name).expanduser()
    is_config = path.is_file() and path.suffix == ".json"
    if is_config and path.name != "config.json":
        raise ValueError(f"'{name}' is not named config.json, which Transformers asks of a config; rename it")
    folder = path.parent if is_config else _find(name)
    table = read_config(folder)
    has_weights = not is_config and any((folder / file).is_file() for file in (SINGLE_FILE, INDEX_FILE))
    if has_weights or (not is_config and any(next(folder.glob(pattern), None) for pattern in PICKLED)):
        check_folder(folder)
    _check_counts(table, name)
    with _explained(f"the config of '{name}' cannot be read"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    method = quantisation(config)
    if method not in (None, METHOD):
        raise ValueError(
            f"'{name}' is quantised ({method}); start from the checkpoint in float32 or bfloat16"
        )
    dropout = table["quantization_config"].get("smoe_dropout") if method == METHOD else None
    if method == METHOD and not has_weights and allow_compressed:
        raise ValueError(f"'{name}' is a compressed model without its weights; name the folder that has them")
    if method == METHOD and (not has_weights or (dropout is None and not allow_compressed)):
        raise ValueError(f"'{name}' is a compressed Mixture-of-Experts model; train needs a dense one")
    return Source(name, folder, config, has_weights, None if dropout is None else read_dropout_spec(dropout))


def resolve_start(options: TrainOptions, source: Source) -> str:
    """``scratch``, ``carve``, ``copy``, or ``continue`` for a checkpoint with SMoE-Dropout layers.

    Raises:
        ValueError: What was asked for needs weights, or none, or other experts than there are.
    """
    if options.start in ("carve", "copy") and not source.has_weights:
        raise ValueError(
            f"--start {options.start} needs weights, and '{source.name}' has none ({SINGLE_FILE}); name a "
            "checkpoint, or take --start scratch"
        )
    if source.spec is None:
        return options.start if options.start != "auto" else "carve" if source.has_weights else "scratch"
    defaults = {field.name: field.default for field in fields(options)}
    if said := [name for name in LAYOUT if getattr(options, name) != defaults[name]]:
        raise ValueError(
            f"'{source.name}' has SMoE-Dropout layers already and is trained as it is; leave out "
            f"--{said[0].replace('_', '-')}, or name a dense model"
        )
    if options.experts not in (None, source.spec.num_experts):
        raise ValueError(
            f"'{source.name}' has {source.spec.num_experts} experts already; leave out "
            f"--experts {options.experts}"
        )
    return "continue"


def resolve_combine(options: TrainOptions, start: str) -> Any:
    """The rule that weighs the chosen experts, for a model that gets new ones."""
    if options.combine != "auto":
        return options.combine
    if options.router in ("hash", "thor"):
        return "uniform"
    if options.router == "learned":
        return "softmax"  # uniform weights would teach it nothing
    if options.router == "analytic":
        return "residual"
    return "uniform" if start == "carve" and options.form != "stock" else "softmax"


def prepare_config(source: Source, task: str, labels: Sequence[str], processor: Any) -> PreTrainedConfig:
    """The source's config as the task needs it: labels of the head, and a padding token."""
    config = source.config
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: number for number, label in enumerate(labels)}
    if task.endswith("classification") and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = processor.pad_token_id
    if type(config) not in TASKS[task]._model_mapping:
        raise ValueError(
            f"model type {config.model_type!r} has no class with a head for --task {options_task(task)}"
            f"{' of pictures' if task == 'images' else ''} in Transformers"
        )
    return config


def options_task(task: str) -> str:
    """The value of --task that a key of `TASKS` belongs to."""
    return "classification" if task == "images" else task


@contextmanager
def whole_tensors() -> Iterator[None]:
    """Keep DeepSpeed ZeRO-3 from dividing tensors while a model is built; it does so when training begins."""
    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference


def training_skeleton(config: PreTrainedConfig, task: str, name: str) -> PreTrainedModel:
    """The model on the meta device: all shapes, no weights; dense where it has SMoE-Dropout layers.

    Raises:
        ValueError: The config contradicts itself.
    """
    with (
        torch.device("meta"),
        whole_tensors(),
        _quietly(),
        _explained(f"no model can be built from the config of '{name}'"),
    ):
        model = TASKS[task].from_config(copy.deepcopy(config), dtype=torch.float32)
    table = quantisation_table(config)
    if table and not table.get("smoe_dropout"):
        with _explained(f"the quantization_config of '{name}' cannot be carried out"):
            _rebuild(model, table)
    return model


def build_model(
    source: Source, config: PreTrainedConfig, task: str, *, start: str, seed: int
) -> PreTrainedModel:
    """The model before any conversion, in float32 on the CPU; the same on every process.

    Raises:
        ValueError: Weights are missing, do not fit the config, or hold NaN or infinity.
    """
    torch.manual_seed(seed)
    if start == "scratch":
        with whole_tensors(), _quietly() as report, _explained(f"'{source.name}' cannot be built", report):
            return TASKS[task].from_config(copy.deepcopy(config), dtype=torch.float32)
    model, new = _load(source, config, task, dtype="float32")
    is_whole = task == "causal-lm"
    _refuse_lost(source, model, new if is_whole else [name for name in new if IN_A_LAYER.search(name)])
    if new:
        warn(f"not in '{source.name}', so drawn at random: {', '.join(new)}")
    return model


def load_trained(source: Source, config: PreTrainedConfig, task: str, *, dtype: str) -> PreTrainedModel:
    """A model with all its weights, the head's too, on the CPU and in evaluation mode.

    Args:
        source: Its files.
        config: Its config.
        task: A key of `TASKS`.
        dtype: ``auto`` (the checkpoint's own), ``float32`` or ``bfloat16``.

    Raises:
        ValueError: Weights are missing, do not fit the config, or hold NaN or infinity.
    """
    model, new = _load(source, config, task, dtype=dtype)
    has_trunk = not any(map(IN_A_LAYER.search, new))
    if task != "causal-lm" and has_trunk and f"{task_head(model).name}.weight" in new:
        raise ValueError(
            f"'{source.name}' has no head for --task {options_task(task)} that fits its config.json ("
            f"{', '.join(new)}), so it was not trained for it; train it for the task first, or name a model "
            "that was"
        )
    _refuse_lost(source, model, new)
    return model.eval()


def _load(
    source: Source, config: PreTrainedConfig, task: str, *, dtype: str
) -> tuple[PreTrainedModel, list[str]]:
    """A model, and the names of what its files did not hold."""
    with whole_tensors(), _quietly() as report, _explained(f"'{source.name}' cannot be loaded", report):
        model, info = TASKS[task].from_pretrained(
            source.folder,
            config=config,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=task != "causal-lm",
            output_loading_info=True,
        )
    check_finite(model.named_parameters(), source.name)
    # Entries are names, or tuples of a name and two shapes.
    return model, sorted({*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])})


def _refuse_lost(source: Source, model: PreTrainedModel, lost: list[str]) -> None:
    if lost:
        raise ValueError(
            f"the weights of '{source.name}' lack {len(lost)} tensors that {type(model).__name__} needs, "
            f"{lost[0]!r} the first: config and weights do not belong together, or a file is incomplete"
        )


def empty_twin(config: PreTrainedConfig, task: str) -> PreTrainedModel:
    """The dense model of a config with whatever weights, to measure how fast it is."""
    plain = copy.deepcopy(config)
    vars(plain).pop("quantization_config", None)
    with whole_tensors(), _quietly():
        return TASKS[task].from_config(plain, dtype=torch.float32).eval()


def convert(model: PreTrainedModel, options: TrainOptions, *, start: str, partition: Any) -> PreTrainedModel:
    """Give the model the SMoE-Dropout layers that the options ask for.

    Raises:
        ValueError: What `to_smoe_dropout` refuses.
    """
    return to_smoe_dropout(
        model,
        options.experts or DEFAULT_EXPERTS,
        resolve_combine(options, start),
        options.seed,
        start="copy" if start == "copy" else "carve",
        partition=partition,
        drop_fraction=options.drop_fraction,
        router=options.router,
        layers=options.layers or None,
        logit_std=LOGIT_STD if options.logit_std is None else options.logit_std,
    )


def shared_experts(options: TrainOptions) -> int:
    """How many experts are always active: none but with --router analytic, and there a quarter."""
    if options.router != "analytic":
        return 0
    experts = options.experts or DEFAULT_EXPERTS
    return max(1, experts // 4) if options.shared_experts is None else options.shared_experts


def convert_analytically(
    model: PreTrainedModel, options: TrainOptions, batches: list[dict[str, Any]]
) -> PreTrainedModel:
    """Carve shared and routed experts by what the neurons do on some batches.

    Raises:
        ValueError: What `to_cmoe` refuses.
    """
    experts = options.experts or DEFAULT_EXPERTS
    layers = options.layers or None
    return to_cmoe(model, batches, experts, shared_experts(options), seed=options.seed, layers=layers)


def load_processor(name: str | None, source: Source, task: str, *, option: str = "--tokenizer") -> Any:
    """The tokenizer, or for pictures the image processor.

    Args:
        name: Folder or hub id; by default that of the model.
        source: The model.
        task: A key of `TASKS`.
        option: Where the user can name one.

    Raises:
        ValueError: There is none, or it cannot pad where it has to.
    """
    folder = source.folder if name is None else _find(name)
    if task == "images":
        try:
            return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        # Whatever is wrong with it, the advice is the same.
        except Exception as error:
            raise ValueError(
                f"'{folder}' has no image processor that can be loaded: {error}; name one with {option}"
            ) from error
    try:
        tokenizer = load_tokenizer(str(folder))
    except ValueError as error:
        raise ValueError(f"{error}; name one with {option}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if task.endswith("classification") and tokenizer.pad_token is None:
        raise ValueError(f"the tokenizer of '{folder}' has neither padding nor end; set its pad_token")
    return tokenizer
