"""The options of `moekit distill`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from .options import (
    DataOptions,
    OptionalInt,
    OptionalNumber,
    OptionalPath,
    OptionalText,
    Switch,
    TrainingOptions,
)

Student = Positional[Annotated[str, arg(metavar="STUDENT")]]


@dataclass(frozen=True, kw_only=True)
class StudentOptions(DataOptions):
    """What `moekit distill` understands beyond data and loop: the teacher, and what is learned from it."""

    teacher: OptionalText = None
    """Folder or hub id of the teacher: any model with the student's task, dense or with experts."""
    teacher_tokenizer: OptionalText = None
    """Folder or hub id of its tokenizer (for pictures: image processor), if not beside it."""
    teacher_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the teacher in memory; auto is the checkpoint's own."""
    loss: Literal[
        "kl",
        "dhkd",
        "bild",
        "binary-kl",
        "binary-kl-norm",
        "dkd",
        "jsd",
        "mse",
        "reverse-kl",
        "skewed-kl",
        "skewed-reverse-kl",
        "top-k-kl",
        "uld",
    ] = "kl"
    """What is minimised beside the labels' cross-entropy. dhkd: binary-kl-norm, on a second head. uld: for a
    teacher with another vocabulary."""
    heads: Literal["auto", "single", "dual"] = "auto"
    """dual: the task head hears the labels alone, and a second one, dropped in the end, the teacher. auto:
    dual for dhkd, else single."""
    auxiliary_head: Literal["bottleneck", "linear", "copy"] = "bottleneck"
    """The second head: for teachers of another family, of the same, or a copy of the task head at first."""
    auxiliary_width: int = 200
    """Of the bottleneck."""
    auxiliary_norm: Literal["auto", "batch", "rms", "none"] = "auto"
    """Of the bottleneck. auto: batch for classifiers of texts and pictures, as in the paper, whose statistics
    are of one micro-batch; else rms."""
    auxiliary_dropout: float = 0.1
    """Of the bottleneck."""
    weight: OptionalNumber = None
    """Of the loss; 1 unless said otherwise, but the published weight for dhkd and binary-kl-norm."""
    label_weight: float = 1.0
    """Of the labels' cross-entropy; 0 for the teacher alone."""
    temperature: OptionalNumber = None
    """Of the loss; the loss's own unless said otherwise."""
    center: Literal["none", "mean", "logprob"] = "none"
    """For losses of raw logits: the constant taken off each row of both sides."""
    beta: OptionalNumber = None
    """Of jsd (0.5 unless said otherwise) and dkd (8)."""
    skew: OptionalNumber = None
    """Of the skewed losses; 0.1 unless said otherwise."""
    top_k: OptionalInt = None
    """Tokens that top-k-kl (64 unless said otherwise) and bild (8) look at, and that a top-k cache keeps."""
    align_gradients: bool = False
    """Keep the second head's gradient from undoing what the labels teach."""
    align_at: Literal["features", "backbone", "all"] = "features"
    """Where the two gradients are compared: at the features that both heads read, over the parameters that
    both reach, or over all, as in the released code; over parameters only in one process without
    accumulation."""
    align_every: int = 1
    """Steps between measurements."""
    align_smoothing: float = 0.0
    """Weight of the past in the running mean of the factor, 0 to 1."""
    stop_epoch: OptionalNumber = None
    """From this epoch on there are only labels; teacher and second head are dropped."""
    cache: OptionalPath = None
    """Folder of what the teacher says, made once and used again; the teacher is not in memory meanwhile."""
    cache_kind: Literal["auto", "hidden", "top-k", "logits"] = "auto"
    """hidden: exact for any loss. top-k: small, for top-k-kl. auto: top-k for that, logits for classifiers,
    else hidden."""
    cache_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the cache; auto is the teacher's own."""
    train_only: Literal["all", "routers"] = "all"
    """routers: heal a compressed model by its routers alone (Router KD)."""
    load_balance: float = 0.0
    """For students with experts: weight of the load-balancing loss."""
    compare: Switch = True
    """With --no-compare: do not compare the result with the teacher, which loads it again after a cache."""


@dataclass(frozen=True, kw_only=True)
class DistillOptions(TrainingOptions, StudentOptions):
    """Train a student on what a teacher says: a smaller model, or a compressed one that is to be healed.

    A run that was interrupted goes on from its last checkpoint when the same command is given again.
    """

    command = "distill"
    model: Student
    """Folder or hub id of the student, or, to begin from scratch, a config.json or a folder without
    weights. Without a tokenizer or image processor beside it, it takes the teacher's."""
