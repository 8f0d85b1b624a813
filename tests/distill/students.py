"""Tiny random students of each kind, and inputs for them."""

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

NUM_LABELS = 5
TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
DECODER = TEXT | {"num_key_value_heads": 1, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "pad_token_id": 0}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 8, "patch_size": 4}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
MOE = DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2}

STUDENTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama-lm": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "llama-tied-lm": ("LlamaForCausalLM", "LlamaConfig", DECODER | {"tie_word_embeddings": True}),
    "gemma2-lm": ("Gemma2ForCausalLM", "Gemma2Config", DECODER | {"final_logit_softcapping": 3.0}),
    "granite-lm": ("GraniteForCausalLM", "GraniteConfig", DECODER | {"logits_scaling": 4.0}),
    "mixtral-lm": ("MixtralForCausalLM", "MixtralConfig", MOE),
    "gpt2-lm": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "bert-sequence": ("BertForSequenceClassification", "BertConfig", TEXT),
    "roberta-sequence": ("RobertaForSequenceClassification", "RobertaConfig", TEXT | {"pad_token_id": 1}),
    "llama-sequence": ("LlamaForSequenceClassification", "LlamaConfig", DECODER),
    "gpt2-sequence": ("GPT2ForSequenceClassification", "GPT2Config", GPT2),
    "bert-token": ("BertForTokenClassification", "BertConfig", TEXT),
    "llama-token": ("LlamaForTokenClassification", "LlamaConfig", DECODER),
    "vit-image": ("ViTForImageClassification", "ViTConfig", VISION),
    "resnet-image": ("ResNetForImageClassification", "ResNetConfig", RESNET),
}


def student_model(name: str, seed: int = 0) -> PreTrainedModel:
    """Build one, in evaluation mode."""
    model, config, values = STUDENTS[name]
    torch.manual_seed(seed)
    return getattr(transformers, model)(getattr(transformers, config)(num_labels=NUM_LABELS, **values)).eval()


def inputs_for(model: PreTrainedModel, batch: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """A batch of text, the last row padded on the right; or of pictures."""
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        size = getattr(model.config, "image_size", 16)
        return {"pixel_values": torch.randn(batch, 3, size, size, generator=generator)}
    ids_BS = torch.randint(3, 40, (batch, 7), generator=generator)
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[-1, 4:] = 0
    return {
        "input_ids": ids_BS.masked_fill(mask_BS == 0, model.config.pad_token_id),
        "attention_mask": mask_BS,
    }
