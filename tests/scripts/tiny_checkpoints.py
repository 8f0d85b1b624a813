"""Checkpoints and texts of a few kilobytes, as the command line would meet them."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

VOCABULARY = 300
CONTEXT = 128
TEXT_OPTIONS = [
    "--seq-len",
    "32",
    "--calibration-tokens",
    "2048",
    "--eval-tokens",
    "512",
    "--batch-size",
    "4",
]


def tiny_tokenizer(size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<end>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((row["text"] for row in tiny_rows()), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")


def tiny_rows() -> list[dict[str, str]]:
    """Two domains: sums with answers, and word salad."""
    rng = random.Random(0)
    words = ["the", "router", "sends", "every", "token", "to", "few", "experts", "and", "some", "are", "idle"]
    salad = [{"domain": "salad", "text": " ".join(rng.choices(words, k=30))} for _ in range(40)]
    pairs = [(rng.randrange(10), rng.randrange(10)) for _ in range(150)]
    return salad + [{"domain": "sums", "text": f"Q: {a} + {b}\nA: {a + b}\n"} for a, b in pairs]


def write_data(path: Path) -> Path:
    """The rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows()), encoding="utf-8")
    return path


def tiny_qwen(**changes: object) -> PreTrainedModel:
    """A random Qwen3-MoE of two layers with eight experts."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 24,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.2,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**sizes, **changes})).eval()  # pyright: ignore


def tiny_switch() -> PreTrainedModel:
    """A random Switch Transformer with one sparse layer on either side."""
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        d_ff=24,
        d_kv=8,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_experts=8,
        decoder_start_token_id=1,
        eos_token_id=0,
        pad_token_id=1,
    )
    return SwitchTransformersForConditionalGeneration(config).eval()


def write_checkpoint(folder: Path, model: PreTrainedModel | None = None, **save: object) -> Path:
    """A model and its tokenizer, as `save_pretrained` leaves them."""
    (model or tiny_qwen()).save_pretrained(folder, **save)  # pyright: ignore
    tiny_tokenizer().save_pretrained(folder)
    return folder
