r"""Train a small OLMoE from scratch on domain-labelled text: the recipe of the bundled checkpoint.

    python -m moekit.scripts.pretrain --data train.jsonl.gz --out small-moe
    python -m moekit.scripts.pretrain --data train.jsonl.gz --out finished \
        --init small-moe/trainer/checkpoint-5000 --answer-marker $'\nA:' --steps 1800

Each line of the data is ``{"domain": ..., "text": ...}``; plain text files work too and form one domain.
Domains are sampled by ``--domain-share`` (default: by size), because experts specialise only when the
domains that a user cares about are really seen.
"""

import random
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from ..moe.documents import load_documents
from ..moe.trainer import MoETrainer

SPECIAL_TOKENS = ("<|endoftext|>", "<|pad|>")
END_ID, PAD_ID = 0, 1


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Train a small sparse Mixture-of-Experts language model, tokenizer included."""

    data: str
    """Text, ``.jsonl``, ``.parquet`` or a ``datasets`` name, with ``text`` and, optionally, ``domain``."""
    out: Path
    """Folder of the finished checkpoint; Trainer's own checkpoints go to ``OUT/trainer``."""
    domain_share: dict[str, float] = field(default_factory=dict)
    """Share of the tokens by domain; what is not named shares the rest by size."""
    steps: int = 5000
    """Optimizer steps."""
    batch_size: int = 16
    """Sequences in each step."""
    seq_len: int = 256
    """Tokens per sequence."""
    vocab_size: int = 2048
    """Entries of the byte-level BPE tokenizer trained on the same data."""
    hidden_size: int = 160
    num_layers: int = 4
    num_experts: int = 16
    top_k: int = 2
    expert_width: int = 112
    learning_rate: float = 3e-3
    init: Path | None = None
    """Go on from this checkpoint, with its sizes and tokenizer, instead of a new model."""
    answer_marker: str | None = None
    """In documents that hold this text only what follows it is learned (``$'\\nA:'`` in a shell)."""
    seed: int = 0


def read_documents(source: str) -> dict[str, list[str]]:
    """Read the documents of each domain, in file order."""
    texts = defaultdict(list)
    for document in load_documents(source):
        texts[document.domain].append(document.text)
    return dict(texts)


def train_tokenizer(documents: dict[str, list[str]], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that splits digits one by one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for texts in documents.values() for text in texts[:8000])
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL_TOKENS[END_ID],
        eos_token=SPECIAL_TOKENS[END_ID],
        pad_token=SPECIAL_TOKENS[PAD_ID],
        model_max_length=1024,
    )


def domain_shares(sizes: dict[str, int], asked: dict[str, float]) -> dict[str, float]:
    """Complete the asked shares: domains that are not named share the rest by size."""
    unknown = sorted(set(asked) - set(sizes))
    if unknown or sum(asked.values()) > 1:
        raise ValueError(
            f"--domain-share names {unknown or 'shares above 1'}; the data has the domains {sorted(sizes)} "
            "and their shares may sum to at most 1"
        )
    rest = sum(size for domain, size in sizes.items() if domain not in asked)
    left = 1 - sum(asked.values())
    return {d: asked.get(d, left * size / rest if rest else 0.0) for d, size in sizes.items()}


@dataclass(frozen=True, slots=True)
class Example:
    """One document as tokens."""

    ids: list[int]
    prompt_length: int = 0
    """Tokens at the start that are read but not learned."""


def tokenise(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, answer_marker: str | None
) -> list[Example]:
    """Turn documents into tokens; up to the end of the marker, if one holds it, they are a prompt."""
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    examples = []
    for text, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        found = -1 if answer_marker is None else text.find(answer_marker)
        end = found + len(answer_marker or "") if found >= 0 else 0
        examples.append(Example(ids, sum(start < end for start, _ in offsets)))
    return examples


def pack(
    examples: dict[str, list[Example]], shares: dict[str, float], *, length: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Concatenate documents, each ended by `END_ID`, into one stream that keeps the shares of the domains.

    The next document comes from the domain that lags most behind its share; a domain that is used up
    starts again in a new order.

    Returns:
        Token ids and labels, `length` each; a label is -100 where nothing is learned.
    """
    rng = random.Random(seed)
    order: dict[str, list[int]] = {d: [] for d in examples}
    used = dict.fromkeys(examples, 0)
    stream: list[int] = []
    labels: list[int] = []
    while len(stream) < length:
        domain = min(shares, key=lambda d: used[d] / shares[d] if shares[d] else float("inf"))
        if not order[domain]:
            order[domain] = rng.sample(range(len(examples[domain])), len(examples[domain]))
        example = examples[domain][order[domain].pop()]
        stream += [*example.ids, END_ID]
        labels += [*[-100] * example.prompt_length, *example.ids[example.prompt_length :], END_ID]
        used[domain] += len(example.ids) + 1
    return torch.tensor(stream[:length]), torch.tensor(labels[:length])


class TokenRows(Dataset[dict[str, Tensor]]):
    """Rows of one long stream and its labels."""

    def __init__(self, ids_NS: Tensor, labels_NS: Tensor) -> None:
        self.ids_NS = ids_NS
        self.labels_NS = labels_NS

    def __len__(self) -> int:
        return len(self.ids_NS)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids_NS[index], "labels": self.labels_NS[index]}


def build_model(config: PretrainConfig) -> OlmoeForCausalLM:
    """Build the untrained OLMoE."""
    return OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.expert_width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_experts=config.num_experts,
            num_experts_per_tok=config.top_k,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            output_router_logits=True,
            router_aux_loss_coef=0.01,
            bos_token_id=END_ID,
            eos_token_id=END_ID,
            pad_token_id=PAD_ID,
        )
    )


def load_model(folder: Path) -> OlmoeForCausalLM:
    """Read a checkpoint to go on with."""
    model = OlmoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.output_router_logits = True
    return model


def training_arguments(config: PretrainConfig) -> TrainingArguments:
    """Adam with a cosine schedule, as small language models are trained."""
    return TrainingArguments(
        output_dir=str(config.out / "trainer"),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.05},
        warmup_steps=200,
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        logging_steps=50,
        save_steps=500,
        save_total_limit=1,
        seed=config.seed,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
    )


def main(config: PretrainConfig) -> None:
    """Train, resuming what was interrupted, then write the checkpoint in bfloat16 with its tokenizer."""
    documents = read_documents(config.data)
    if config.init is None:
        tokenizer = train_tokenizer(documents, config.vocab_size)
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(config.init)
    examples = {d: tokenise(texts, tokenizer, config.answer_marker) for d, texts in documents.items()}
    sizes = {d: sum(len(example.ids) for example in found) for d, found in examples.items()}
    length = config.steps * config.batch_size * config.seq_len
    ids, labels = pack(examples, domain_shares(sizes, config.domain_share), length=length, seed=config.seed)
    del documents, examples

    set_seed(config.seed)
    model = build_model(config) if config.init is None else load_model(config.init)
    rows = TokenRows(ids.view(-1, config.seq_len), labels.view(-1, config.seq_len))
    trainer = MoETrainer(
        model=model,
        args=training_arguments(config),
        train_dataset=rows,
        data_collator=default_data_collator,
        processing_class=tokenizer,  # so that every checkpoint of Trainer can be gone on from
    )
    folder = config.out / "trainer"
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    model.config.output_router_logits = False
    model.config.use_cache = True  # Trainer turns it off
    model.bfloat16().save_pretrained(config.out)
    tokenizer.save_pretrained(config.out)


if __name__ == "__main__":
    main(tyro.cli(PretrainConfig))
