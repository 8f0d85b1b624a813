"""The teacher of `moekit distill`: its files, its model, and the cache of what it says."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

from ..distill.cached_teacher import CachedTeacher
from ..distill.counted import counted_rows
from ..distill.head_losses import likeliest
from ..distill.losses import ValidRows
from ..distill.teacher_cache import CachedRows, CacheSpec, TeacherCache, build_cache
from ..distill.teacher_cache_format import examples_per_shard
from ..distill.teachers import ModelTeacher, Said, TopK
from .checkpoint_files import content_fingerprint
from .console import is_interactive
from .train_data import processor_fingerprint
from .train_model import Source, load_trained

FLOAT_BYTES = 4
"""The most that a number of a cache takes."""


@dataclass(frozen=True, kw_only=True)
class TeacherSource:
    """A teacher that has passed every check of its files."""

    source: Source
    config: PreTrainedConfig
    model_class: type[PreTrainedModel]
    task: str
    processor: Any
    """Tokenizer or image processor."""
    is_same_reader: bool
    """Whether it reads what the student reads."""
    num_columns: int | None
    """Tokens that both know, where either head is padded."""
    num_features: int
    """Width of what its head reads."""
    dtype: str

    def load(self, device: torch.device) -> PreTrainedModel:
        """Its model.

        Raises:
            ValueError: Weights are missing, or hold NaN or infinity.
        """
        model: Any = load_trained(self.source, self.config, self.task, dtype=self.dtype)
        return model.to(device)

    def in_memory(self, device: torch.device) -> ModelTeacher:
        """Its model, ready to answer."""
        return ModelTeacher(self.load(device), num_columns=self.num_columns)


def cache_source(teacher: TeacherSource, data: str, max_length: int | None) -> dict[str, str]:
    """Fingerprints of all that a teacher's answers depend on.

    Args:
        teacher: Who answers.
        data: Fingerprint of the examples to train on.
        max_length: Tokens to which they are cut.
    """
    return {
        "model": content_fingerprint(teacher.source.folder),
        "tokenizer": processor_fingerprint(teacher.processor),
        "data": data,
        "length": str(max_length),
        "columns": str(teacher.num_columns),
        "dtype": teacher.dtype,
    }


def shard_examples(teacher: TeacherSource, kind: str, top_k: int, num_rows: int) -> int:
    """How many examples a shard has that is held in memory while it is made.

    Args:
        teacher: Who answers.
        kind: Of the cache.
        top_k: Tokens kept, for ``top-k``.
        num_rows: The most that an example can have.
    """
    widths = {"hidden": teacher.num_features, "top-k": 2 * top_k, "logits": teacher.config.num_labels}
    return examples_per_shard(FLOAT_BYTES * num_rows * widths[kind])


def open_cache(
    folder: Path,
    spec: CacheSpec,
    teacher: TeacherSource,
    rows: Any,
    collate: Any,
    arguments: TrainingArguments,
) -> CachedTeacher:
    """Open the cache; build what it lacks first, each process its part.

    Raises:
        ValueError: The folder holds another cache, or anything else, or another build is running there.
    """
    state: Any = arguments.distributed_state
    device, barrier = arguments.device, (lambda: None) if state is None else state.wait_for_everyone
    is_whole = _is_whole(folder, spec)
    barrier()  # all have to see the same, before any begins to build
    if not is_whole:
        answer = teacher.in_memory(device)

        def batches_of(examples: range) -> Any:
            size = arguments.per_device_eval_batch_size
            return DataLoader(Subset(rows, examples), batch_size=size, collate_fn=collate)

        shown = is_interactive() and arguments.process_index == 0
        with tqdm(
            total=spec.num_examples, desc="asking the teacher", unit="example", disable=not shown
        ) as bar:
            build_cache(
                folder,
                spec,
                lambda examples: _ask(answer, spec, batches_of(examples), device),
                head=answer.head if spec.kind == "hidden" else None,
                process_index=arguments.process_index,
                num_processes=arguments.world_size,
                barrier=barrier,
                progress=bar.update,
            )
    barrier()
    return CachedTeacher(TeacherCache.open(folder, spec), device)


def _is_whole(folder: Path, spec: CacheSpec) -> bool:
    try:
        TeacherCache.open(folder, spec)
    except ValueError:  # what is wrong with it, if it cannot be mended, building says
        return False
    return True


def _ask(teacher: ModelTeacher, spec: CacheSpec, batches: Any, device: torch.device) -> CachedRows:
    """The teacher's answers on the examples of a shard."""
    counts, answers = [], []
    for batch in batches:
        moved = _moved(batch, device)
        counted = counted_rows(moved, is_language_model=teacher.is_language_model)
        said = teacher.says(moved, counted)
        counts.append(_counts(counted, len(moved["labels"])))
        answers.append(_tensors(said, spec))
    joined = {name: torch.cat([answer[name] for answer in answers]) for name in answers[0]}
    return CachedRows(torch.cat(counts), joined)


def _counts(rows: ValidRows | None, num_examples: int) -> torch.Tensor:
    if rows is None:
        return torch.ones(num_examples, dtype=torch.long)
    return torch.bincount(rows.positions.cpu() // rows.batch_shape[1], minlength=num_examples)


def _tensors(said: Said, spec: CacheSpec) -> dict[str, torch.Tensor]:
    if spec.kind == "top-k":
        assert spec.top_k is not None
        assert not isinstance(said, TopK)
        kept = likeliest(said, spec.top_k)
        return {"log_probs": kept.log_probs.cpu(), "ids": kept.ids.cpu()}
    if isinstance(said, torch.Tensor):
        return {"logits": said.cpu()}
    assert not isinstance(said, TopK)
    return {"hidden": said.hidden.cpu()}


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, dict):
        return {key: _moved(value, device) for key, value in batch.items()}
    return batch.to(device)
