"""Tiny random models that continue text, and what they should say, one token and no cache at a time."""

from functools import cache

import torch
from moekit.compress.apply import apply_plan
from moekit.compress.m_smoe import plan_m_smoe
from moekit.moe.discovery import expert_layers
from moekit.moe.recording import record_routing
from moekit.rl.generation.generator import Sample, SampleRequest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ...moe.families import FAMILIES
from ...moe.tiny_models import randomise

PAD, EOS, VOCAB = 0, 2, 64
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": EOS,
}


def llama() -> PreTrainedModel:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    randomise(model, 0)
    return model


def gemma2() -> PreTrainedModel:
    """Attention in a window shorter than the texts, capped scores and logits."""
    config = Gemma2Config(**SHAPE, sliding_window=6, query_pre_attn_scalar=8)
    config._attn_implementation = "eager"
    model = Gemma2ForCausalLM(config).eval()
    randomise(model, 0)
    return model


def merged() -> PreTrainedModel:
    """Qwen3-MoE, three experts of eight, behind a router that knows eight."""
    model = FAMILIES["qwen3_moe"]()
    with record_routing(model) as statistics, torch.no_grad():
        model(torch.arange(3, 60).unsqueeze(0))
    apply_plan(model, plan_m_smoe(expert_layers(model), statistics, experts=3))
    return model


BUILDERS = {"llama": llama, "gemma2": gemma2, "merged": merged}
BUILDERS |= {name: FAMILIES[name] for name in ("olmoe", "qwen3_moe", "mixtral", "qwen3_next", "minimax")}


@cache
def model_of(name: str) -> PreTrainedModel:
    """Not to be changed."""
    return BUILDERS[name]()


def prompts_of(*lengths: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randint(3, VOCAB, (n,), generator=generator).tolist()) for n in lengths]


def requests_of(*lengths: int, num_samples: int = 1) -> list[SampleRequest]:
    return [
        SampleRequest(prompt_ids=prompt, num_samples=num_samples, seed=seed)
        for seed, prompt in enumerate(prompts_of(*lengths))
    ]


@torch.no_grad()
def full_logits(model: PreTrainedModel, prompt: tuple[int, ...], ids: tuple[int, ...]) -> torch.Tensor:
    """``[L, V]`` of one forward over prompt and completion, without a cache."""
    text = torch.tensor([prompt + ids])
    return model(input_ids=text, use_cache=False).logits[0, len(prompt) - 1 : -1]


def same(first: list[list[Sample]], second: list[list[Sample]]) -> bool:
    pairs = [(a, b) for f, s in zip(first, second, strict=True) for a, b in zip(f, s, strict=True)]
    return all(
        a.ids == b.ids
        and a.is_finished == b.is_finished
        and torch.allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-5)
        for a, b in pairs
    )


def letters() -> PreTrainedTokenizerFast:
    """64 tokens: three special ones, and a byte each."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz.,!?:;-+="
    vocabulary = {name: i for i, name in enumerate(["<pad>", "<bos>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
