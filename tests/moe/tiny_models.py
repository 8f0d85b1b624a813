"""Builds a tiny random model of any family from its configuration class, its model class and a few arguments.

``TINY`` holds one value for each configuration field that families share; a field that a class lacks is
left out.
The table of families is in ``families.py``.
"""

import dataclasses
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

TINY: dict[str, Any] = {
    # sizes
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    # experts and routing
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "shared_intermediate_size": 16,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    # attention: multi-head, multi-head latent, sparse-indexed
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_topk": 4,
    "index_head_dim": 8,
    "index_n_heads": 4,
    # linear attention and Mamba mixers
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 1,
    "chunk_size": 8,
    # hyper-connections
    "hc_mult": 2,
    "hc_sinkhorn_iters": 3,
    # encoders of images and audio, which the text-only inputs never run
    "depth": 1,
    "num_heads": 4,
    "d_model": 32,
    "out_hidden_size": 32,
    "output_dim": 32,
    "projector_hidden_size": 32,
    "output_channels": 8,
    "projection_intermediate_size": 24,
    "num_position_embeddings": 16,
    # tokens inside the tiny vocabulary
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # no extra multi-token-prediction layers
    "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Family:
    """One row of the table: how to build a tiny random model of a family."""

    config: str
    model: str
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(self, seed: int = 0) -> PreTrainedModel:
        """Builds the model on the CPU in float32, in evaluation mode."""
        config = tiny_config(getattr(transformers, self.config), self.overrides)
        torch.manual_seed(seed)
        model = getattr(transformers, self.model)(config).float().eval()
        randomise(model, seed)
        return model


def tiny_config(config_class: type[PreTrainedConfig], overrides: dict[str, Any]) -> PreTrainedConfig:
    """Returns a configuration, and its parts, with the values of ``TINY`` and, above them, ``overrides``."""
    fields = {field.name for field in dataclasses.fields(config_class)}
    values = {name: value for name, value in TINY.items() if name in fields} | overrides
    for name, part in getattr(config_class, "sub_configs_defaults", {}).items():
        part_class = CONFIG_MAPPING[part.model_type] if hasattr(part, "config_class") else part
        values[name] = tiny_config(part_class, overrides.get(name, {}))
    return config_class(**values)


def randomise(model: PreTrainedModel, seed: int) -> None:
    """Fills every weight with seeded noise: no router is constant, nothing stays uninitialised."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: Tensor, std: float) -> Tensor:
        return torch.randn(tensor.shape, generator=generator) * std

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and not name.endswith("bias"):
                parameter.copy_(noise(parameter, 0.2))
            else:
                usable = torch.isfinite(parameter) & (parameter.abs() < 10)
                parameter.copy_(torch.where(usable, parameter, 0.0) + noise(parameter, 0.1))
        for name, buffer in model.named_buffers():
            if name.endswith("bias"):  # added to the scores when experts are chosen; zero when new
                buffer.copy_(noise(buffer, 0.05))
            if name.endswith("balancing_biases"):  # ZAYA; loading resets the last, of the skip class, to -1
                buffer[:-1].copy_(noise(buffer[:-1], 0.05))
            if name.endswith("tid2eid"):  # the experts of each token, where routing is by hash
                num_experts = model.config.n_routed_experts
                buffer.copy_(
                    torch.rand(len(buffer), num_experts, generator=generator).argsort(1)[:, : buffer.shape[1]]
                )


def tiny_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Returns two sequences of seven tokens, the second right-padded, as the model's forward wants them."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, TINY["vocab_size"], (2, 7), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 5:] = 0
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if model.main_input_name == "pixel_values":
        pixels = torch.randn(2, 3, 16, 16, generator=generator)
        return {"pixel_values": pixels, "dataset_index": torch.tensor([0, 2])}
    if model.config.is_encoder_decoder or hasattr(model.config, "canvas_length"):
        inputs["decoder_input_ids"] = torch.randint(3, TINY["vocab_size"], (2, 5), generator=generator)
    return inputs
