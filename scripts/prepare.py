"""Everything that `moekit compress` checks before it loads any weights."""

import json
import re
from dataclasses import dataclass, field, fields
from inspect import signature
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..compress.budget import share_experts
from ..compress.methods import METHODS, SEQUENTIAL
from ..compress.plan import FORMAT as PLAN_FORMAT
from ..compress.plan import CompressionPlan, LowRankRule, check_fits, check_form
from ..compress.scores import NEEDS_NO_DATA
from ..moe.data import check_tokenizer
from ..moe.discovery import expert_layers
from .calibrate import (
    NO_DATA,
    Texts,
    check_token_ids,
    even_statistics,
    probe_texts,
    read_texts,
    sequence_length,
)
from .compress_presets import with_preset
from .descent_checks import check_descent, check_descent_layers
from .healing import check_healing, check_row_pruning
from .load import ModelSource, find_device, load_tokenizer, open_source, skeleton
from .options import METHOD_OPTIONS, CompressOptions, flag
from .processes import Processes, join_processes
from .sequential import check_sequential
from .staging import check_output

SAMPLE_FILE = "sample.jsonl"
"""Text that the bundled model was not trained on."""
PLAN_FILE = "plan.json"
PLANNED = (
    "method",
    "form",
    *METHOD_OPTIONS,
    "exclude_layers",
    "protect",
    "sequential",
    "rank",
    "sparse_rows",
)
"""Options that a plan has settled."""
MAX_SEED = 2**63 - 1
SIZE = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*[KMGT]B\s*", re.IGNORECASE)
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
    processes: Processes = field(default_factory=Processes)
    """Which read their shares of the calibration text."""


def prepare(options: CompressOptions, *, replace: bool = False) -> Job:
    """Check everything that can be checked without loading the weights.

    Args:
        options: What the user asked for.
        replace: The output folder may hold something.
    """
    _check_settled(options)
    options = with_preset(options)
    _check_options(options, replace=replace)
    source = open_source(options.model)
    check_healing(options, is_encoder_decoder=source.config.is_encoder_decoder)
    _check_grouping(options, is_encoder_decoder=source.config.is_encoder_decoder)
    model = skeleton(source)
    layers = expert_layers(model)
    plan = None if options.plan is None else CompressionPlan.load(options.plan)
    if options.until_collapse_risk is not None:
        check_descent_layers(layers, options)
    rule = low_rank_rule(options) if plan is None else plan.low_rank
    check_row_pruning(options, rule, is_sequential=is_sequential(options))
    if plan is None:
        share_experts(layers, even_statistics(layers), **budget_options(options))
        if rule is not None:
            for layer in layers:
                check_fits(rule, layer)
        planner_options(options)
    elif plan.router != "logsumexp":  # whether a router allows that is seen only with its weights
        plan.validate_against(layers)
    tokenizer = load_tokenizer(source)
    check_tokenizer(tokenizer, source.config)
    if _does_without_data(options):
        data, texts = NO_DATA, probe_texts(model)
    else:
        data = bundled_data(source) if options.data is None else options.data
        texts = read_texts(
            data,
            tokenizer,
            seq_len=sequence_length(options.seq_len, source.config),
            calibration_tokens=options.calibration_tokens,
            eval_tokens=options.eval_tokens,
            seed=options.seed,
        )
    for blocks in (texts.calibration, texts.held_out):
        check_token_ids(blocks, model)
    processes = join_processes("compress", options.device)
    if processes.count > 1 and options.until_collapse_risk is not None:
        raise ValueError("--until-collapse-risk decides step by step in one process; start one")
    processes.share(texts.calibration, options.batch_size)
    return Job(
        options=options,
        source=source,
        tokenizer=tokenizer,
        data=data,
        texts=texts,
        plan=plan,
        processes=processes,
    )


def _does_without_data(options: CompressOptions) -> bool:
    """Whether nothing that is asked for reads any text."""
    reads_use = options.grouping in ("adaptive", "sensitivity") or options.plan is not None
    has_report = options.report and not options.plan_only
    is_judged = (
        has_report
        or options.heal != "none"
        or options.data is not None
        or options.until_collapse_risk is not None
    )
    return options.method in NEEDS_NO_DATA and not (reads_use or is_judged)


def _check_options(options: CompressOptions, *, replace: bool) -> None:
    check_names(options.model, options.data)
    if options.out is None and not options.plan_only:
        raise ValueError(
            "--out is missing: name the folder to make, or add --plan-only to look at the plan first"
        )
    if options.out is not None and options.plan_only:
        _check_plan_output(options.out)
    elif options.out is not None:
        check_output(options.out, replace=replace)
    flags = ("experts", "ratio", "layer_experts", "until_collapse_risk", "plan")
    given = [flag.replace("_", "-") for flag in flags if getattr(options, flag) not in (None, ())]
    if len(given) != 1:
        said = "none of them" if not given else " and ".join(f"--{flag}" for flag in given)
        allowed = "--experts, --ratio, --layer-experts, --until-collapse-risk and --plan"
        raise ValueError(f"give one of {allowed}, got {said}")
    if options.plan is not None and options.plan_only:
        raise ValueError("--plan carries out a plan and --plan-only makes one; give either")
    _check_planned(options)
    if options.batch_size < 1:
        raise ValueError(f"--batch-size {options.batch_size} is not a positive number of sequences")
    if not options.answer_marker.strip():
        raise ValueError(f"--answer-marker {options.answer_marker!r} is blank")
    check_shard_size(options.max_shard_size)
    _check_stream(options)
    check_descent(options)
    check_machine(options.device, options.seed)


def _check_stream(options: CompressOptions) -> None:
    """Refuse what needs a whole model in memory, or all layers at once."""
    if not options.stream:
        if options.memory_limit is not None:
            raise ValueError("--memory-limit is of --stream; add that")
        return
    if options.memory_limit is not None:
        check_shard_size(options.memory_limit, flag="--memory-limit")
    whole = {
        "--plan": options.plan is not None,
        "--plan-only": options.plan_only,
        "--heal": options.heal != "none",
    }
    if said := [flag for flag, is_said in whole.items() if is_said]:
        raise ValueError(f"--stream has one layer in memory at a time, which {said[0]} cannot do with")
    check_sequential(options.grouping, options.exclude_layers, options.layer_experts)


def check_names(model: str, data: str | None) -> None:
    """Refuse an empty name, which as a path would be the folder one is in."""
    if not model.strip():
        raise ValueError("MODEL is empty; name a folder or a hub id")
    if data is not None and not data.strip():
        raise ValueError("--data is empty; name a file, a folder or a `datasets` name")


def check_shard_size(text: str, *, flag: str = "--max-shard-size") -> None:
    """Refuse what is no size."""
    size = SIZE.fullmatch(text)
    if size is None or float(size[1]) == 0:
        raise ValueError(f"{flag} {text!r} is not a size such as 500MB or 5GB")


def check_machine(device: str | None, seed: int) -> None:
    """Refuse a device that is not there, and a seed that torch cannot take."""
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"--seed {seed} is not between 0 and {MAX_SEED}")
    find_device(device)


def _check_planned(options: CompressOptions) -> None:
    """Refuse what contradicts the form of checkpoint, or the order of the layers."""
    if options.plan is None and is_sequential(options):
        check_sequential(options.grouping, options.exclude_layers, options.layer_experts)
    elif options.form == "stock" and options.exclude_layers:
        raise ValueError(
            "--form stock has one number of experts for all layers, so --exclude-layers cannot be; leave it "
            "out, or take --form moekit"
        )


def _check_settled(options: CompressOptions) -> None:
    """Refuse what a plan has settled."""
    defaults = {field.name: field.default for field in fields(options)}
    said = [name for name in PLANNED if getattr(options, name) != defaults[name]]
    if options.plan is not None and said:
        flags = ", ".join(map(flag, said))
        raise ValueError(f"--plan has settled {flags}; leave that out, or edit the plan")


def _check_grouping(options: CompressOptions, *, is_encoder_decoder: bool) -> None:
    """Refuse numbers of experts that are decided in two ways, or in one that this model or form has not."""
    shared = options.grouping in ("adaptive", "sensitivity")
    if shared and options.layer_experts:
        raise ValueError(
            "--layer-experts says how many each layer keeps, which "
            f"--grouping {options.grouping} would find out; give either"
        )
    if shared and options.form == "stock":
        raise ValueError(
            "form='stock' needs the same number of experts in every layer, which "
            f"--grouping {options.grouping} does not give; use --grouping uniform, or --form moekit"
        )
    if options.grouping == "sensitivity" and is_encoder_decoder:
        raise ValueError(
            "--grouping sensitivity compares the next tokens of a decoder; this model is an encoder-decoder: "
            "use --grouping adaptive, uniform, or --layer-experts"
        )


def plan_path(out: Path) -> Path:
    """Where `--plan-only --out` puts the plan."""
    return out if out.suffix == ".json" else out / PLAN_FILE


def _check_plan_output(out: Path) -> None:
    """Refuse a place for a plan where something else is; only a plan that was named is overwritten."""
    path = plan_path(out)
    if out.is_file() and path != out:
        raise ValueError(f"output '{out}' is a file; --out must name a folder or a .json file")
    if path.is_symlink() or path.is_dir():
        raise ValueError(f"output '{path}' is a folder or a symbolic link; choose another --out")
    if not path.exists():
        return
    if path != out:
        raise ValueError(f"'{path}' exists; give --out {path} to overwrite it, or choose another folder")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("format") != PLAN_FORMAT:
        raise ValueError(f"output '{path}' exists and is not a plan of moekit; choose another --out")


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
    if options.stream or is_sequential(options):
        said = {"grouping": "uniform"} | said
    if "router" in said:
        check_form(options.form, said["router"])
    return {
        **budget_options(options),
        "form": options.form,
        "seed": options.seed,
        "protect": options.protect,
        **said,
    }


def low_rank_rule(options: CompressOptions) -> LowRankRule | None:
    """What becomes of the experts' matrices after merging.

    Raises:
        ValueError: Numbers that cannot be, or a form that cannot hold factors.
    """
    if options.rank is None:
        if options.sparse_rows and options.take != "rank":
            raise ValueError("--sparse-rows is of low-rank experts; add --rank")
        return None
    if options.form == "stock":
        raise ValueError("--rank needs --form moekit; the stock form has no low-rank experts")
    return LowRankRule(rank=options.rank, sparse_rows=options.sparse_rows)


def is_sequential(options: CompressOptions) -> bool:
    """Whether each layer is planned behind those that are compressed already."""
    if options.plan is not None or options.sequential == "off":
        return False
    return options.sequential == "on" or options.method in SEQUENTIAL


def budget_options(options: CompressOptions) -> dict[str, Any]:
    """How many experts each layer is to keep, as `share_experts` is asked."""
    given = {"experts": options.experts, "ratio": options.ratio, "exclude_layers": options.exclude_layers}
    if options.until_collapse_risk is not None:
        given["ratio"] = 1.0  # where it begins
    return given | ({"layer_experts": options.layer_experts} if options.layer_experts else {})


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
