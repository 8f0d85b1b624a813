"""A tiny random dense model of each kind of feed-forward network in transformers 5.23.

``model = DENSE_MODELS["llama"]()``; ``model(**inputs_for(model))``.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

VOCAB_SIZE = 32

TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = TEXT | {"num_key_value_heads": 1}
WITH_HEAD_DIM = GROUPED | {"head_dim": 8}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
GPT2 = {"vocab_size": VOCAB_SIZE, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "n_inner": 24}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
OPT = {name: value for name, value in TEXT.items() if name != "intermediate_size"} | {"ffn_dim": 24}
OPT |= {"word_embed_proj_dim": 16}
DISTILBERT = {"vocab_size": VOCAB_SIZE, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2}
BART = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 32,
}
XLM = {"vocab_size": VOCAB_SIZE, "emb_dim": 16, "n_layers": 2, "n_heads": 2}
T5 = {"vocab_size": VOCAB_SIZE, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}


def _build(model: str, config: str, values: dict[str, Any], seed: int = 0) -> PreTrainedModel:
    """Every weight is noise: no bias is zero, nothing stays uninitialised."""
    built = getattr(transformers, model)(getattr(transformers, config)(**values)).float().eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in built.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return built


def _row(model: str, config: str, values: dict[str, Any], **others: Any) -> Callable[[], PreTrainedModel]:
    return partial(_build, model, config, values | others)


DENSE_MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "apertus": _row("ApertusForCausalLM", "ApertusConfig", GROUPED, hidden_act="xielu"),
    "bart": _row("BartForConditionalGeneration", "BartConfig", BART),
    "bert": _row("BertForMaskedLM", "BertConfig", TEXT),
    "bert_classification": _row("BertForSequenceClassification", "BertConfig", TEXT),
    "cohere": _row("CohereForCausalLM", "CohereConfig", GROUPED),
    "deit": _row("DeiTForImageClassification", "DeiTConfig", VISION),
    "distilbert": _row("DistilBertForMaskedLM", "DistilBertConfig", DISTILBERT),
    "electra": _row("ElectraForMaskedLM", "ElectraConfig", TEXT, embedding_size=16),
    "falcon": _row("FalconForCausalLM", "FalconConfig", TEXT, ffn_hidden_size=24, bias=True),
    "gemma": _row("GemmaForCausalLM", "GemmaConfig", WITH_HEAD_DIM),
    "gemma2": _row("Gemma2ForCausalLM", "Gemma2Config", WITH_HEAD_DIM),
    "gemma3_text": _row("Gemma3ForCausalLM", "Gemma3TextConfig", WITH_HEAD_DIM),
    "glm": _row("GlmForCausalLM", "GlmConfig", WITH_HEAD_DIM),
    "gpt2": _row("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt_neox": _row("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT),
    "granite": _row("GraniteForCausalLM", "GraniteConfig", GROUPED, mlp_bias=True),
    "lfm2": _row("Lfm2ForCausalLM", "Lfm2Config", GROUPED, block_auto_adjust_ff_dim=False),
    "llama": _row("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "llama_bias": _row("LlamaForCausalLM", "LlamaConfig", GROUPED, mlp_bias=True),
    "llama_square": _row("LlamaForCausalLM", "LlamaConfig", GROUPED, intermediate_size=16),
    "mistral": _row("MistralForCausalLM", "MistralConfig", GROUPED),
    "modernbert": _row("ModernBertForMaskedLM", "ModernBertConfig", TEXT, cls_token_id=1, sep_token_id=2),
    "olmo2": _row("Olmo2ForCausalLM", "Olmo2Config", GROUPED),
    "openai_gpt": _row("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", GPT2),
    "opt": _row("OPTForCausalLM", "OPTConfig", OPT),
    "opt_no_bias": _row("OPTForCausalLM", "OPTConfig", OPT, enable_bias=False),
    "opt_norm_after": _row("OPTForCausalLM", "OPTConfig", OPT, do_layer_norm_before=False),
    "phi": _row("PhiForCausalLM", "PhiConfig", TEXT),
    "phi3": _row("Phi3ForCausalLM", "Phi3Config", GROUPED),
    "qwen2": _row("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "qwen2_classification": _row("Qwen2ForSequenceClassification", "Qwen2Config", GROUPED),
    "qwen3": _row("Qwen3ForCausalLM", "Qwen3Config", WITH_HEAD_DIM),
    "roberta": _row("RobertaForMaskedLM", "RobertaConfig", TEXT),
    "smollm3": _row("SmolLM3ForCausalLM", "SmolLM3Config", GROUPED),
    "starcoder2": _row("Starcoder2ForCausalLM", "Starcoder2Config", GROUPED),
    "t5": _row("T5ForConditionalGeneration", "T5Config", T5, dropout_rate=0.0),
    "t5_gated": _row(
        "T5ForConditionalGeneration", "T5Config", T5, dropout_rate=0.0, feed_forward_proj="gated-gelu"
    ),
    "vit": _row("ViTForImageClassification", "ViTConfig", VISION),
    "xlm": _row(
        "XLMWithLMHeadModel", "XLMConfig", {"vocab_size": VOCAB_SIZE, "emb_dim": 16}, n_layers=2, n_heads=2
    ),
}
"""Models whose feed-forward networks are found."""


def inputs_for(model: PreTrainedModel) -> dict[str, Tensor]:
    """The arguments of a forward pass: two rows of token ids, or two images."""
    generator = torch.Generator().manual_seed(7)
    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        return {"pixel_values": torch.randn(2, 3, size, size, generator=generator)}
    ids_BS = torch.randint(3, VOCAB_SIZE, (2, 5), generator=generator)
    if model.config.is_encoder_decoder:
        return {"input_ids": ids_BS, "decoder_input_ids": ids_BS}
    return {"input_ids": ids_BS}
