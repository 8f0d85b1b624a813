"""Tiny random policies, and batches of completions for them."""

from typing import Any

import torch
import transformers
from moekit.moe import expert_layers
from moekit.rl import Prompt, Rollout, RolloutGroup, policy_batch
from moekit.rl.batch import PolicyBatch
from transformers import PreTrainedModel

VOCABULARY = 40
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = TEXT | {"num_experts_per_tok": 2}
POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", TEXT),
    "llama-tied": ("Llama", TEXT | {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2", TEXT | {"final_logit_softcapping": 3.0}),
    "cohere": ("Cohere", TEXT | {"logit_scale": 0.25}),
    "gpt2": (
        "GPT2",
        {k: v for k, v in TEXT.items() if k.endswith("id") or k == "vocab_size"}
        | {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    ),
    "mixtral": ("Mixtral", MOE | {"num_local_experts": 4, "router_jitter_noise": 0.1}),
    "olmoe": ("Olmoe", MOE | {"num_experts": 8, "output_router_logits": True}),
    "qwen3_moe": ("Qwen3Moe", MOE | {"num_experts": 8, "moe_intermediate_size": 16, "norm_topk_prob": True}),
}


def tiny_model(name: str, seed: int = 0, **values: Any) -> PreTrainedModel:
    """Build one, in evaluation mode; with weights so large that its distributions are far from uniform."""
    family, config_values = POLICIES[name]
    config = getattr(transformers, f"{family}Config")(**config_values | values)
    torch.manual_seed(seed)
    head = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    model = getattr(transformers, head)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def compressed(name: str, num_kept: int = 4, router: str = "redirect") -> PreTrainedModel:
    """The first experts of each layer, behind the router of all."""
    model = tiny_model(name)
    for layer in expert_layers(model):
        expert_map = [expert % num_kept for expert in range(layer.num_experts)]
        layer.replace_experts(layer.experts()[:num_kept], expert_map, router=router)
    return model


LENGTHS = [(4, 5), (2, 3), (3, 6), (1, 1)]


def tiny_batch(lengths: list[tuple[int, int]] = LENGTHS) -> PolicyBatch:
    """Completions of those numbers of prompt and completion tokens; tokens depend on the numbers alone."""
    groups = []
    for prompt, completion in lengths:
        generator = torch.Generator().manual_seed(100 * prompt + completion)
        ids = torch.randint(3, VOCABULARY, (prompt + completion,), generator=generator).tolist()
        row = Rollout(completion_ids=tuple(ids[prompt:]), text="", is_truncated=False)
        given = Prompt(index=0, text="", ids=tuple(ids[:prompt]), given="")
        groups.append(RolloutGroup(prompt=given, rollouts=(row,), rewards=torch.zeros(1)))
    return policy_batch(groups, pad_id=0)
