"""Everything that `moekit compress` checks before it loads any weights."""

from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..compress.budget import share_experts
from ..compress.methods import METHODS
from ..compress.plan import CompressionPlan, check_form
from ..moe.data import check_tokenizer
from ..moe.discovery import expert_layers
from .calibrate import Texts, even_statistics, read_texts, sequence_length
from .load import ModelSource, load_tokenizer, open_source, skeleton
from .options import CompressOptions
from .staging import check_output

SAMPLE_FILE = "sample.jsonl"
"""Text that the bundled model was not trained on."""
METHOD_OPTIONS = ("grouping", "similarity", "weighting", "alignment", "reference", "router")
_STOCK = {"grouping": "uniform", "router": "slice"}


@dataclass(frozen=True, kw_only=True)
class Job:
    """Options that passed every check, and what they name."""

    options: CompressOptions
    source: ModelSource
    tokenizer: PreTrainedTokenizerBase
    data: str
    texts: Texts
    plan: CompressionPlan | None
    """Given by the user."""


def prepare(options: CompressOptions) -> Job:
    """Check everything that can be checked without loading the weights."""
    _check_options(options)
    source = open_source(options.model)
    layers = expert_layers(skeleton(source))
    plan = None if options.plan is None else CompressionPlan.load(options.plan)
    if plan is None:
        sizes = {"experts": options.experts, "ratio": options.ratio, "exclude_layers": options.exclude_layers}
        share_experts(layers, even_statistics(layers), **sizes)  # pyright: ignore[reportArgumentType]
        planner_options(options)
    elif plan.router != "logsumexp":  # whether a router allows that is seen only with its weights
        plan.validate_against(layers)
    data = options.data or bundled_data(source)
    tokenizer = load_tokenizer(source)
    check_tokenizer(tokenizer, source.config)
    texts = read_texts(
        data,
        tokenizer,
        seq_len=sequence_length(options.seq_len, source.config),
        calibration_tokens=options.calibration_tokens,
        eval_tokens=options.eval_tokens,
        seed=options.seed,
    )
    return Job(options=options, source=source, tokenizer=tokenizer, data=data, texts=texts, plan=plan)


def _check_options(options: CompressOptions) -> None:
    if options.out is None and not options.plan_only:
        raise ValueError(
            "--out is missing: name the folder to make, or add --plan-only to look at the plan first"
        )
    if options.out is not None:
        check_output(options.out)
    given = [flag for flag in ("experts", "ratio", "plan") if getattr(options, flag) is not None]
    if len(given) != 1:
        said = "none of them" if not given else " and ".join(f"--{flag}" for flag in given)
        raise ValueError(f"give one of --experts, --ratio and --plan, got {said}")
    if options.plan is not None and options.plan_only:
        raise ValueError("--plan carries out a plan and --plan-only makes one; give either")
    if options.batch_size < 1:
        raise ValueError(f"--batch-size {options.batch_size} is not a positive number of sequences")
    if not options.answer_marker.strip():
        raise ValueError(f"--answer-marker {options.answer_marker!r} is blank")


def planner_options(options: CompressOptions) -> dict[str, Any]:
    """Arguments of the chosen method's planner; what the user left open is left to its defaults.

    Raises:
        ValueError: An option that the method has not, or a form and a router that exclude each other.
    """
    known = signature(METHODS[options.method]).parameters
    said = {name: getattr(options, name) for name in METHOD_OPTIONS if getattr(options, name) != "auto"}
    if foreign := sorted(said.keys() - known.keys()):
        raise ValueError(f"--{foreign[0]} does not apply to --method {options.method}")
    if options.form == "stock":
        said = {name: value for name, value in _STOCK.items() if name in known} | said
    if "router" in said:
        check_form(options.form, said["router"])
    common = {"experts": options.experts, "ratio": options.ratio, "exclude_layers": options.exclude_layers}
    seed = {"seed": options.seed} if "seed" in known else {}
    return {**common, "form": options.form, **seed, **said}


def bundled_folder() -> Path:
    """Where the small model that comes with moekit is."""
    return Path(__file__).parent / "bundled"


def bundled_data(source: ModelSource) -> str:
    """The held-out text that comes with the bundled model.

    Raises:
        ValueError: The model is another one, so that `--data` is needed.
    """
    if source.folder.resolve() == bundled_folder().resolve():
        return str(bundled_folder() / SAMPLE_FILE)
    raise ValueError(
        "--data is missing: name text like that which the model will meet (a .txt, .jsonl or .parquet file, "
        "a folder, or a `datasets` name); routing is recorded on it, and the result judged on a part of it"
    )
