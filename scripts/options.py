"""The options of every command: plain data, read from the command line before anything heavy is imported."""

import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from tyro.conf import Positional, arg

Dtype = Literal["auto", "float32", "bfloat16"]

# Without a hint of their own, options that may be left out would be shown as "{None}|PATH (default: None)".
Model = Positional[Annotated[str, arg(metavar="MODEL")]]
Method = Literal[
    "m-smoe",
    "hc-smoe",
    "ream",
    "mone",
    "reap",
    "frequency",
    "routing-weight",
    "ean",
    "man",
    "aimer",
    "random",
]
OptionalText = Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")]
OptionalPath = Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="")]
OptionalInt = Annotated[int | None, arg(metavar="INT", help_behavior_hint="")]
OptionalFloat = Annotated[float | None, arg(metavar="SHARE", help_behavior_hint="")]
Switch = Annotated[bool, arg(help_behavior_hint="")]
Integers = Annotated[tuple[int, ...], arg(metavar="INT ...", help_behavior_hint="")]
Names = Annotated[tuple[str, ...], arg(metavar="NAME ...", help_behavior_hint="")]
OptionalNumber = Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="")]
Start = Positional[Annotated[str, arg(metavar="MODEL_OR_CONFIG")]]


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """What every command understands."""

    debug: bool = False
    """Show the traceback of an error (so does MOEKIT_DEBUG=1)."""


@dataclass(frozen=True, kw_only=True)
class InspectOptions(CommonOptions):
    """Show what a checkpoint holds, how it routes, and what compression would save."""

    model: Model
    """Folder or hub id of a Mixture-of-Experts checkpoint."""
    data: OptionalText = None
    """Text whose routing to record: a .txt, .jsonl or .parquet file, a folder, or a `datasets` name."""
    json: OptionalPath = None
    """Also write everything shown to this file."""
    report: OptionalPath = None
    """Also write pictures of load and similarity into this folder; needs --data."""
    load_weights: Switch = True
    """With --no-load-weights: do not read the weights; any size is inspected at once, but no router's rule
    is known."""
    seq_len: OptionalInt = None
    """Tokens per sequence; 512, or less where the model's context is shorter."""
    tokens: int = 65536
    """Most tokens of the data to run."""
    batch_size: int = 8
    """Sequences at a time."""
    min_tokens: int = 32
    """Experts that fewer tokens chose are listed as judged on too few."""
    dtype: Dtype = "auto"
    """Of the weights in memory; auto is the checkpoint's own."""
    device: OptionalText = None
    """Such as cpu or cuda:0; by default the accelerator, if there is one."""
    seed: int = 0
    """Of the choice of the text."""


@dataclass(frozen=True, kw_only=True)
class CompressOptions(CommonOptions):
    """Make a checkpoint with fewer experts, and a report of what was lost.

    A run that was interrupted goes on where it was when the same command is given again. Processes that
    torchrun or accelerate start together share the calibration text and the healing.
    """

    model: Model
    """Folder or hub id of a Mixture-of-Experts checkpoint."""
    out: OptionalPath = None
    """Folder to make, which may not exist yet or be empty. With --plan-only, a folder without a plan.json, or
    a .json file; a plan there is overwritten."""
    experts: OptionalInt = None
    """Experts to keep in each layer (on average, for --grouping adaptive). Or --ratio, or --plan."""
    ratio: OptionalFloat = None
    """Share of the experts to keep, in (0, 1]."""
    plan: OptionalPath = None
    """Carry out this plan, perhaps edited, instead of making one; what it settles is no longer to be said."""
    plan_only: bool = False
    """Make and show the plan, and stop."""
    preset: Literal["none", "best"] = "none"
    """best: what had the lowest KL in our benchmarks, --method ean with --grouping sensitivity, and --heal
    router with --heal-learning-rate 3e-4, wherever these are left on auto."""
    method: Literal["auto"] | Method = "auto"
    """auto: the preset's, or m-smoe. m-smoe, hc-smoe and ream merge groups of experts; the others keep the
    experts of the highest score and drop the rest; mone puts their mean outputs in their place. aimer and
    random need no data. See docs/compress.md."""
    grouping: Literal["auto", "adaptive", "uniform", "sensitivity", "random"] = "auto"
    """How many experts each layer keeps. auto: the preset's, or adaptive for m-smoe in the moekit form, else
    uniform. sensitivity: more where cutting a layer alone is seen to hurt more."""
    layer_experts: Integers = ()
    """Experts to keep in each MoE layer, one number each, instead of --experts."""
    until_collapse_risk: OptionalNumber = None
    """Instead of --experts: cut step by step, heal (--heal), measure, and stop where the next cut would fall
    below --quality-floor with more than this probability."""
    take: Literal["experts", "rank"] = "experts"
    """What that takes, cut by cut: experts, chosen by --method; or the rank of the matrices of all experts,
    as --rank does at once, with --sparse-rows beside it."""
    quality_floor: float = 0.9
    """Of that: what is to be left of all that the original gets from the context, 1 for all of it."""
    collapse_store: OptionalPath = None
    """Of that: a file in which runs leave what they saw, for later ones on models of the same shape."""
    protect: Switch = True
    """With --no-protect: super experts, whose outputs dwarf all others, are dropped and merged like any."""
    similarity: Literal["auto", "router-logits", "weights", "outputs"] = "auto"
    """Which experts count as alike: router-logits unless said otherwise."""
    weighting: Literal["auto", "frequency", "equal"] = "auto"
    """What the members of a group weigh: their use (frequency) unless said otherwise."""
    alignment: Literal["auto", "weights", "activations", "both", "none"] = "auto"
    """How neurons are matched before experts are added: by their weights, by what they do on a sample of the
    calibration tokens (activations), by both, or not at all (none). auto: weights for m-smoe, both for ream,
    none for hc-smoe."""
    sequential: Literal["auto", "on", "off"] = "auto"
    """Plan each layer behind those that are compressed already, not all from the original; auto: on for ream.
    Costs a part of a forward pass for each layer."""
    reference: Literal["auto", "dominant", "first"] = "auto"
    """Whose neuron order they take: the most used expert's (dominant) unless said otherwise."""
    router: Literal["auto", "redirect", "slice", "mean", "logsumexp", "constant"] = "auto"
    """What becomes of the routers. auto: redirect for m-smoe and hc-smoe in the moekit form, constant for
    mone, else slice. constant: for methods that prune; what was pruned is replaced by its mean output."""
    rank: OptionalInt = None
    """Then store each matrix of an expert as a product of this rank (gate and up share one), plus whole rows
    of its residual; moekit form only."""
    sparse_rows: float = 0.0
    """Share of the rows that are stored so, in [0, 1]."""
    prune_rows: bool = False
    """With --heal kd: begin with all rows, and let the least important ones go while healing, down to
    --sparse-rows (LoSparse)."""
    heal: Literal["auto", "none", "router", "kd"] = "auto"
    """Let the result learn from the original on the calibration text. auto: the preset's, or none. router:
    its routers alone, by KL (cheap). kd: all weights, by the text and 0.2 KL at temperature 2."""
    heal_steps: OptionalInt = None
    """Optimizer steps of that, of --batch-size sequences in each process; one pass through the text unless
    said otherwise."""
    heal_learning_rate: OptionalNumber = None
    """Largest of that; 5e-5 unless said otherwise."""
    form: Literal["moekit", "stock"] = "moekit"
    """moekit holds any plan exactly and loads after `import moekit.moe`; stock loads without moekit."""
    exclude_layers: Integers = ()
    """MoE layers to leave as they are, counted from 0."""
    data: OptionalText = None
    """Text to calibrate and judge on: a .txt, .jsonl or .parquet file, a folder, or a `datasets` name."""
    seq_len: OptionalInt = None
    """Tokens per sequence; 512, or less where the model's context is shorter."""
    calibration_tokens: int = 65536
    """Most tokens to record the routing on."""
    eval_tokens: int = 32768
    """Most tokens, none of them among the former, to judge the result on."""
    batch_size: int = 8
    """Sequences at a time."""
    seed: int = 0
    """Of the choice of the text, and of random groups."""
    dtype: Dtype = "auto"
    """Of the weights, in memory and in the result; auto is the checkpoint's own."""
    device: OptionalText = None
    """Such as cpu or cuda:0; by default the accelerator, if there is one."""
    answer_marker: str = "\\nA:"
    """What stands before the answer in question-answer documents, which are scored; \\n is a line break."""
    report: Switch = True
    """With --no-report: do not compare the result with the original, and write no report.html."""
    stream: bool = False
    """For checkpoints larger than memory: read, compress and write one decoder layer at a time, every layer
    with the same number of experts. The report says nothing of generated text and speed."""
    memory_limit: OptionalText = None
    """With --stream: refuse to begin if the process, with its libraries, what lies outside of the layers, the
    largest layer and a batch of text, needs more than this, such as 8GB."""
    max_shard_size: str = "5GB"
    """Largest file of weights, such as 500MB or 5GB."""


@dataclass(frozen=True, kw_only=True)
class DemoOptions(CommonOptions):
    """Compress the small model that comes with moekit to half its experts, or win back what that cost."""

    job: Positional[Annotated[Literal["compress", "rl"], arg(metavar="{compress,rl}")]] = "compress"
    """rl: compress it, and then train it to do sums (needs the extra rl; some minutes)."""
    out: OptionalPath = None
    """Folder of the result, moekit-demo or moekit-demo-rl; an earlier demo there is replaced."""


@dataclass(frozen=True, kw_only=True)
class DataOptions(CommonOptions):
    """What a training begins with: a model and data."""

    model: Start
    """Folder or hub id."""
    data: OptionalText = None
    """What to train on. causal-lm: text as for `moekit compress`. classification: rows with text (and
    text_pair) and label in a .jsonl, .csv, .tsv or .parquet file or a `datasets` name, or a folder with a
    folder of pictures for each class. token-classification: rows with lists of tokens and labels, or a .conll
    file with a word and its label on each line."""
    eval_data: OptionalText = None
    """The like to evaluate on; otherwise a part of the data that is not trained on."""
    eval_share: float = 0.05
    """Size of that part."""
    task: Literal["causal-lm", "classification", "token-classification"] = "causal-lm"
    """What is learned."""
    tokenizer: OptionalText = None
    """Folder or hub id of a tokenizer (for pictures: of an image processor), if not beside the model."""
    out: OptionalPath = None
    """Folder to make, which may not exist yet or be empty."""


@dataclass(frozen=True, kw_only=True)
class LoopOptions(CommonOptions):
    """How a training goes, and how it is saved."""

    seq_len: OptionalInt = None
    """Tokens per sequence; 512, or less where the model's context is shorter."""
    steps: OptionalInt = None
    """Optimizer steps. Or --epochs."""
    epochs: OptionalNumber = None
    """Passes through the data; 1 unless said otherwise."""
    batch_size: int = 8
    """Sequences at a time on each device."""
    gradient_accumulation: int = 1
    """Batches in each optimizer step."""
    learning_rate: OptionalNumber = None
    """Largest of the run; 3e-4 from scratch and 5e-5 for a pretrained model unless said otherwise."""
    lr_scheduler: str = "cosine"
    """A schedule of Transformers, such as linear, cosine or constant_with_warmup."""
    warmup: float = 0.05
    """Steps in which the learning rate rises; below 1 as a share of all."""
    weight_decay: float = 0.0
    """Of AdamW."""
    bf16: bool = False
    """Compute in bfloat16; the weights stay in float32."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass, to save memory."""
    save_steps: int = 500
    """Steps between checkpoints; at most so many are lost by an interruption."""
    eval_steps: OptionalInt = None
    """Steps between evaluations while training; none unless said."""
    logging_steps: int = 10
    """Steps between lines of progress."""
    report_to: Names = ()
    """Trackers of Transformers, such as tensorboard or wandb, which have to be installed."""
    seed: int = 0
    """Of everything random."""
    max_shard_size: str = "5GB"
    """Largest file of weights, such as 500MB or 5GB."""
    training_arguments: OptionalPath = None
    """A .json file with any other of Transformers' TrainingArguments, by name."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(LoopOptions, DataOptions):
    """What every command that trains understands.

    A command's own options stand in a subclass of `DataOptions`, which comes after this one among the
    command's bases: then `--help` shows them between the data and the loop.
    """

    command: ClassVar[str]
    """Its name."""


@dataclass(frozen=True, kw_only=True)
class SlimmableOptions(DataOptions):
    """What `moekit train` understands beyond that: experts, and what becomes of them."""

    experts: OptionalInt = None
    """Experts of each layer: 16 unless said otherwise, or those that the checkpoint has already."""
    k_start: OptionalInt = None
    """Active experts at the first step; half of them unless said otherwise."""
    k_end: OptionalInt = None
    """Active experts at the end and in the result; all unless said otherwise."""
    schedule: Literal["linear", "exponential", "cosine", "stepped", "constant", "random"] = "linear"
    """How their number goes from the one to the other. random: each layer's own draw at each step."""
    combine: Literal["auto", "softmax", "uniform", "residual"] = "auto"
    """How chosen experts are weighed. auto: softmax, as in the paper; but uniform where a pretrained model is
    carved, because then it is exactly that model at k = all, and where the router has no probabilities."""
    start: Literal["auto", "scratch", "carve", "copy"] = "auto"
    """scratch: new weights. carve: each pretrained FFN is cut into experts. copy: each expert is a copy of
    it. auto: carve if there are weights, else scratch."""
    drop_fraction: float = 0.0
    """For --start copy: share of each copy's neurons drawn anew (Drop-Upcycling), 0 to 1."""
    partition: Literal["contiguous", "random", "weights", "coactivation"] = "contiguous"
    """Which neurons form an expert when a pretrained FFN is carved: neighbours, random ones, those of similar
    weights, or those that are active together on the data."""
    router: Literal["random", "learned", "hash", "thor", "analytic", "none"] = "random"
    """random is SMoE-Dropout's, never trained; learned, hash and thor are what it is compared with; analytic
    is CMoE's, made of the FFN's own neurons, with experts that are always active; none trains the dense
    model."""
    shared_experts: OptionalInt = None
    """For --router analytic: experts that are always active; a quarter unless said otherwise."""
    ffn_dropout: float = 0.0
    """For --router none: dropout within each FFN, 0 to 1."""
    center_routers: bool = False
    """Balance random routers once, by the mean of what they read."""
    load_balance: OptionalNumber = None
    """For --router learned: weight of the load-balancing loss; 0.01 unless said otherwise."""
    consistency: OptionalNumber = None
    """For --router thor: weight of the divergence of its two forwards; 1 unless said otherwise."""
    layers: Integers = ()
    """FFN layers to convert, counted from 0; all unless said otherwise."""
    logit_std: OptionalNumber = None
    """Deviation of a random router's logits for inputs of unit mean square; 0.32 unless said otherwise."""
    eval_experts: Integers = ()
    """Numbers of active experts to evaluate the result at; powers of two and some between unless said
    otherwise."""
    form: Literal["auto", "moekit", "stock", "dense"] = "auto"
    """moekit is exact and loads after `import moekit.moe`; stock loads without moekit, as Mixtral; dense is
    the model at k = all. auto: moekit, or the dense model that --router none trains."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions(TrainingOptions, SlimmableOptions):
    """Train a dense model as a self-slimmable one with SMoE-Dropout: any number of its experts can be active.

    A run that was interrupted goes on from its last checkpoint when the same command is given again.
    """

    command = "train"
    model: Start
    """Folder or hub id of a dense model, or, to begin from scratch, a config.json or a folder without
    weights."""


METHOD_OPTIONS = ("grouping", "similarity", "weighting", "alignment", "reference", "router")
"""Of `CompressOptions`, what a method of compression may be told."""


def flag(name: str) -> str:
    """How an option is written on the command line."""
    return "--" + name.replace("_", "-")


def command_line(command: str, options: CommonOptions) -> str:
    """The command that gives these options, those at their defaults left out."""
    words = ["moekit", command]
    for field in fields(options):
        value = getattr(options, field.name)
        name = flag(field.name)
        if field.name == "model":
            words.append(value)
        elif value != field.default and field.name != "debug":
            values = value if isinstance(value, tuple) else [value]
            words += (
                ["--no-" + name[2:]]
                if value is False
                else [name]
                if value is True
                else [name, *map(str, values)]
            )
    return shlex.join(words)
