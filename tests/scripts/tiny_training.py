"""Dense models and data of a few kilobytes for `moekit train`."""

import json
import random
from pathlib import Path

import torch
from moekit.scripts import cli, train_progress
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from .tiny_checkpoints import CONTEXT, VOCABULARY, tiny_tokenizer, write_checkpoint

QUICK = {"--experts": "4", "--seq-len": "32", "--steps": "4", "--batch-size": "4", "--logging-steps": "2"}


class KilledError(BaseException):
    """Stands for a process that is gone: nothing catches it."""


def tiny_llama(**changes: object) -> LlamaForCausalLM:
    """A random Llama of two layers."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "attention_dropout": 0.1,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()  # pyright: ignore


def tiny_bert() -> BertForMaskedLM:
    """A random BERT of two layers, with the head that it was pretrained with."""
    torch.manual_seed(0)
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            pad_token_id=1,
        )
    ).eval()


def write_config(folder: Path, model: PreTrainedModel | None = None) -> Path:
    """A config and a tokenizer, without weights."""
    (model or tiny_llama()).config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_dense(folder: Path, model: PreTrainedModel | None = None) -> Path:
    """A pretrained dense model."""
    return write_checkpoint(folder, model or tiny_llama())


def write_rows(path: Path) -> Path:
    """Texts with two labels, as JSON lines."""
    rng = random.Random(0)
    words = {"sums": ["one", "two", "plus", "is"], "salad": ["router", "token", "expert", "idle"]}
    rows = [
        {"text": " ".join(rng.choices(words[label], k=rng.randint(3, 9))), "label": label}
        for label in rng.choices(sorted(words), k=60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def train(model: Path, data: Path, out: Path, *more: object, without: str = "") -> int:
    """Run the command with few and short steps, or without one of the options of `QUICK`."""
    return cli.main(["train", *words(model, data, out, *more, without=without)])


def words(model: Path, data: Path, out: Path, *more: object, without: str = "") -> list[str]:
    """Arguments of that command."""
    quick = [word for option in QUICK.items() if option[0] != without for word in option]
    return [*map(str, (model, "--data", data, "--out", out, *quick, *more))]


def kill_after(monkeypatch, step: int) -> None:
    """Let the next training die when it has taken that many steps."""

    def die(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise KilledError

    monkeypatch.setattr(train_progress.TrainingLines, "on_step_end", die)
