"""Everything that `moekit distill` checks before it builds or loads a model."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

from ..distill import DistillationRecipe, task_head
from ..distill.losses import published_weight
from ..distill.teacher_cache import CacheSpec
from ..distill.teacher_cache_build import check_cache_folder
from ..distill.token_alignment import same_tokenizer
from ..distill.trainer import OWN_ARGUMENTS, lost_file
from ..distill.trainer_checks import check_alignment, check_sharded_heads, check_stop_epoch
from ..moe.discovery import has_experts
from .calibrate import context_length, sequence_length
from .console import warn
from .distill_checks import DEFAULT_TOP_K, check_options, make_recipe, try_loss
from .distill_data import DistillRows, aligned_text, collator, same_picture, same_text
from .distill_options import DistillOptions
from .distill_teacher import TeacherSource, cache_source, shard_examples
from .train_arguments import read_arguments_file
from .train_data import known_inputs
from .train_model import Source, load_processor, open_training_source, prepare_config, training_skeleton
from .training_checks import check_training_options
from .training_job import TrainingJob, TrainingTask, common_fields, open_task, read_examples

GENTLER = 20
"""Of DHKD's published weight, what did language models no harm (`benchmarks/distill_lm.py`)."""


@dataclass(frozen=True, kw_only=True)
class DistillJob(TrainingJob):
    """Options that passed every check, and what they name."""

    options: DistillOptions
    teacher: TeacherSource
    recipe: DistillationRecipe
    train_rows: DistillRows
    held_out_rows: DistillRows
    collate: Any
    cache: CacheSpec | None

    @property
    def inputs(self) -> dict[str, Any]:
        """With the teacher."""
        return super().inputs | {"teacher files": self.teacher.source.fingerprint}

    def lost_file(self, checkpoint: Path) -> str | None:
        """One of the second head's, without which the run would go on to another result."""
        if self.recipe.heads == "single":
            return None
        options = self.options
        return lost_file(checkpoint, is_aligned=options.align_gradients, stop_epoch=options.stop_epoch)


def prepare_distillation(options: DistillOptions) -> DistillJob:
    """Check everything that can be checked before a model is built, and read the data.

    Raises:
        ValueError: The first thing that cannot be, with what to do.
    """
    check_training_options(options)
    recipe = make_recipe(options)
    check_options(options, recipe)
    file = read_arguments_file(options.training_arguments)
    if own := sorted(file.keys() & OWN_ARGUMENTS):
        raise ValueError(
            f"--training-arguments '{options.training_arguments}' sets {own[0]}, which distillation sets "
            "itself; leave it out"
        )
    source = open_training_source(options.model, allow_compressed=True)
    teacher_source = _open_teacher_files(options)
    task = open_task(
        options,
        source,
        label_order=partial(_teacher_order, teacher_source, source),
        processor_of=options.teacher_tokenizer or options.teacher,
    )
    teacher = _check_teacher(options, teacher_source, task, recipe)
    _check_student(options, task, recipe, teacher.num_columns)
    examples = read_examples(options, task)
    train, held_out = (_rows(part, options, task, teacher) for part in (examples.train, examples.held_out))
    start = "load" if source.has_weights else "scratch"
    common = common_fields(options, source, task, examples, start=start, file=file)
    _check_training(options, common["arguments"], len(train))
    return DistillJob(
        **common,
        teacher=teacher,
        recipe=recipe,
        train_rows=train,
        held_out_rows=held_out,
        collate=collator(examples.collator, None if teacher.is_same_reader else teacher.processor),
        cache=_cache(options, task, teacher, recipe, examples.train_fingerprint, len(train)),
    )


def _check_training(options: DistillOptions, arguments: TrainingArguments, num_examples: int) -> None:
    """Refuse what the number of processes and of steps shows cannot be."""
    check_sharded_heads(arguments)
    if options.align_gradients:
        check_alignment(options.align_at, arguments)
    if options.stop_epoch is not None:
        check_stop_epoch(options.stop_epoch, arguments, num_examples)


def _open_teacher_files(options: DistillOptions) -> Source:
    assert options.teacher is not None
    teacher = open_training_source(options.teacher, allow_compressed=True)
    if not teacher.has_weights:
        raise ValueError(f"--teacher '{options.teacher}' has no weights; name a trained checkpoint")
    return teacher


def _teacher_order(teacher: Source, student: Source, labels: tuple[str, ...]) -> tuple[str, ...]:
    """The labels of the data as the teacher numbers them.

    Raises:
        ValueError: It was trained on others, or the student numbers the same labels otherwise.
    """
    names, of_student = teacher.labels, student.labels
    if student.has_weights and of_student != names and set(of_student) == set(names):
        raise ValueError(
            f"the student numbers its labels {', '.join(of_student)} and the teacher {', '.join(names)}; "
            "renumber the rows of one head and its id2label"
        )
    if set(labels) <= set(names):
        if len(labels) < len(names):
            warn(
                f"the data have {len(labels)} labels and '{teacher.name}' knows {len(names)}, so the student "
                f"gets {len(names)} classes; see that the {len(labels)} mean the same to both"
            )
        return names
    is_unnamed = all(name == f"LABEL_{number}" for number, name in enumerate(names))
    if is_unnamed and len(names) == len(labels):
        warn(f"'{teacher.name}' does not name its {len(names)} labels; taken for {', '.join(labels)}")
        return labels
    raise ValueError(
        f"the data have the labels {', '.join(labels)}, and the teacher '{teacher.name}' knows "
        f"{len(names)}: {', '.join(names)}; give a teacher that was trained on these labels"
    )


def _check_teacher(
    options: DistillOptions, source: Source, task: TrainingTask, recipe: DistillationRecipe
) -> TeacherSource:
    """Refuse a teacher that this student cannot learn from by this loss."""
    processor = load_processor(options.teacher_tokenizer, source, task.name, option="--teacher-tokenizer")
    config: PreTrainedConfig = prepare_config(source, task.name, task.labels, processor)
    skeleton = training_skeleton(config, task.name, source.name)
    ours, theirs = task_head(task.skeleton).num_classes, task_head(skeleton).num_classes
    is_same_reader = _read_alike(task, processor, type(skeleton))
    if task.name != "images" and is_same_reader:
        _check_context(options, task, config)
    if task.name == "causal-lm" and recipe.method.needs_same_vocabulary:
        if not is_same_reader:
            raise ValueError(
                f"student and teacher have different tokenizers ({len(task.processor)} and {len(processor)} "
                f"tokens), and --loss {options.loss} compares them token by token; take --loss uld, or a "
                "teacher with the student's tokenizer"
            )
        if len(processor) > min(ours, theirs):
            raise ValueError(
                f"the tokenizer has {len(processor)} tokens, more than the heads of student ({ours}) and "
                f"teacher ({theirs}) both know"
            )
    elif task.name == "token-classification" and not is_same_reader:
        raise ValueError(
            "student and teacher have different tokenizers, or add other special tokens, which --task "
            "token-classification cannot align; take a teacher with the student's tokenizer"
        )
    elif task.name != "causal-lm" and ours != theirs:
        raise ValueError(f"the student has {ours} classes and the teacher {theirs}; they must be the same")
    return TeacherSource(
        source=source,
        config=config,
        model_class=type(skeleton),
        task=task.name,
        processor=processor,
        is_same_reader=is_same_reader,
        num_columns=min(ours, theirs) if is_same_reader and ours != theirs else None,
        num_features=task_head(skeleton).num_features,
        dtype=options.teacher_dtype,
    )


def _read_alike(task: TrainingTask, processor: Any, teacher: type[PreTrainedModel]) -> bool:
    """Whether what the student reads is what the teacher would have read."""
    if task.name == "images":
        return processor.to_dict() == task.processor.to_dict()
    is_same = same_tokenizer(task.processor, processor)
    if task.name == "causal-lm" or not is_same:
        return is_same
    if task.name == "token-classification":  # what they add around the words
        ours, theirs = (
            tokenizer([["a", "b"]], is_split_into_words=True) for tokenizer in (task.processor, processor)
        )
        return ours["input_ids"] == theirs["input_ids"]
    ours, theirs = (
        known_inputs(tokenizer(["a", "a b"], ["b", "b"], padding=True), kind)
        for tokenizer, kind in ((task.processor, type(task.skeleton)), (processor, teacher))
    )
    return ours == theirs


def _check_context(options: DistillOptions, task: TrainingTask, teacher: PreTrainedConfig) -> None:
    """Refuse sequences that the teacher, who reads the student's, cannot read."""
    length, context = sequence_length(options.seq_len, task.config), context_length(teacher)
    if context is not None and length > context:
        raise ValueError(
            f"the teacher's context of {context} tokens is less than the student's sequences of {length}; "
            f"give --seq-len {context} or less"
        )


def _check_student(
    options: DistillOptions, task: TrainingTask, recipe: DistillationRecipe, num_columns: int | None
) -> None:
    head = task_head(task.skeleton)
    num_classes = head.num_classes
    if recipe.heads == "dual" and options.auxiliary_norm == "batch" and head.reads_tokens:
        raise ValueError(
            "--auxiliary-norm batch is for one feature an example, and this student has one for each token, "
            "padding included; take rms or none"
        )
    if task.name == "causal-lm" and recipe.loss == "binary-kl-norm" and recipe.weight is None:
        warn(
            f"the published weight of --loss {options.loss} was found to harm language models "
            f"(docs/distill.md); try --weight {published_weight(num_classes, 'sum') / GENTLER:.2g}"
        )
    try_loss(options, recipe, num_columns or num_classes)
    if recipe.heads == "dual" and options.auxiliary_head == "copy" and num_columns not in (None, num_classes):
        raise ValueError(
            f"--auxiliary-head copy has the student's {num_classes} tokens, and the teacher knows "
            f"{num_columns} of them; take --auxiliary-head linear"
        )
    if (options.train_only == "routers" or options.load_balance) and not has_experts(task.skeleton):
        name = "--train-only routers" if options.train_only == "routers" else "--load-balance"
        raise ValueError(f"{name} is for students with experts, and '{options.model}' has none")


def _rows(rows: Any, options: DistillOptions, task: TrainingTask, teacher: TeacherSource) -> DistillRows:
    if teacher.is_same_reader:
        return DistillRows(rows)
    if task.name == "images":
        return DistillRows(rows, same_picture(rows, teacher.processor))
    length, context = sequence_length(options.seq_len, teacher.config), context_length(teacher.config)
    if task.name == "causal-lm":
        longest = 2 * length if context is None else min(2 * length, context)
        return DistillRows(rows, aligned_text(task.processor, teacher.processor, longest))
    return DistillRows(rows, same_text(rows, teacher.processor, teacher.model_class, length))


def _cache(
    options: DistillOptions,
    task: TrainingTask,
    teacher: TeacherSource,
    recipe: DistillationRecipe,
    data: str,
    num_examples: int,
) -> CacheSpec | None:
    """What the cache has to be, checked against what the folder holds.

    Raises:
        ValueError: It holds another cache.
    """
    if options.cache is None:
        return None
    is_language_model, kind = task.name == "causal-lm", options.cache_kind
    if kind == "auto":
        kind = (
            "logits" if not is_language_model else "hidden" if recipe.method.needs_full_teacher else "top-k"
        )
    if (kind == "logits") == is_language_model:
        fits = "hidden or top-k" if is_language_model else "logits"
        raise ValueError(f"--cache-kind {kind} does not fit --task {options.task}; take {fits}")
    length = None
    if task.name != "images":
        length = sequence_length(options.seq_len, (task if teacher.is_same_reader else teacher).config)
    top_k = options.top_k or DEFAULT_TOP_K
    is_whole = task.name in ("classification", "images")
    num_rows = 1 if is_whole else sequence_length(options.seq_len, task.config)
    spec = CacheSpec(
        kind=kind,
        num_examples=num_examples,
        source=cache_source(teacher, data, length),
        top_k=top_k if kind == "top-k" else None,
        dtype=options.cache_dtype,
        shard_examples=shard_examples(teacher, kind, top_k, num_rows),
    )
    folder = Path(options.cache).expanduser()
    _check_apart(folder, options)
    check_cache_folder(folder, spec)
    return spec


def _check_apart(folder: Path, options: DistillOptions) -> None:
    """Refuse a cache within the result, which has to be a new folder, or around it."""
    cache, out = folder.resolve(), Path(str(options.out)).expanduser().resolve()
    if cache == out or cache in out.parents or out in cache.parents:
        raise ValueError(
            f"--cache '{folder}' and --out '{options.out}' are one in the other; keep them apart"
        )
