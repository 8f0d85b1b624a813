"""A tiny random model of every MoE family in transformers 5.23, for the conformance suite.

A family is one row: its configuration class, its model class, and only those arguments that ``TINY`` does
not settle.
``build = FAMILIES["mixtral"]``; ``model = build()``; ``model(**tiny_inputs(model))``.
"""

from collections.abc import Callable

from transformers import PreTrainedModel

from .tiny_models import Family, tiny_inputs

__all__ = ["FAMILIES", "UNSUPPORTED", "tiny_inputs"]

GROUPS = {"n_group": 2, "topk_group": 1}
HYBRID = {"layer_types": ["linear_attention", "full_attention", "full_attention"]}
SWA = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "d_rel": 4,
    "rel_extent": 16,
}
MLA = {"num_key_value_heads": 4}

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "afmoe": Family("AfmoeConfig", "AfmoeForCausalLM"),
    "aria": Family("AriaTextConfig", "AriaTextForCausalLM"),
    "axk1": Family("AXK1Config", "AXK1ForCausalLM", GROUPS | MLA),
    "axk2": Family("AXK2Config", "AXK2ForCausalLM", GROUPS | MLA),
    "bailing_hybrid": Family("BailingHybridConfig", "BailingHybridForCausalLM", GROUPS | MLA | HYBRID),
    "beam": Family("BeamConfig", "BeamForCausalLM", GROUPS),
    "cohere2_moe": Family("Cohere2MoeConfig", "Cohere2MoeForCausalLM"),
    "dbrx": Family(
        "DbrxConfig",
        "DbrxForCausalLM",
        {
            "n_heads": 4,
            "n_layers": 3,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 2},
        },
    ),
    "deepseek_ocr2": Family("DeepseekOcr2Config", "DeepseekOcr2ForConditionalGeneration"),
    "deepseek_v2": Family(
        "DeepseekV2Config", "DeepseekV2ForCausalLM", GROUPS | MLA | {"topk_method": "group_limited_greedy"}
    ),
    "deepseek_v3": Family("DeepseekV3Config", "DeepseekV3ForCausalLM", GROUPS | MLA),
    "deepseek_v32": Family("DeepseekV32Config", "DeepseekV32ForCausalLM", GROUPS | MLA),
    "deepseek_v4": Family(
        "DeepseekV4Config",
        "DeepseekV4ForCausalLM",
        {"mlp_layer_types": ["hash_moe", "moe", "moe"], "o_groups": 2, "o_lora_rank": 8},
    ),
    "diffusion_gemma": Family(
        "DiffusionGemmaConfig",
        "DiffusionGemmaForBlockDiffusion",
        {
            "canvas_length": 5,
            "text_config": {
                "top_k_experts": 2,
                "global_head_dim": 8,
                "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            },
        },
    ),
    "dots1": Family("Dots1Config", "Dots1ForCausalLM", GROUPS),
    "dots3_note": Family(
        "Dots3NoteTextConfig",
        "Dots3NoteForCausalLM",
        MLA | {"shared_experts_intermediate_size": 16, "layer_types": ["full_attention"] * 3},
    ),
    "ernie4_5_moe": Family("Ernie4_5_MoeConfig", "Ernie4_5_MoeForCausalLM"),
    "ernie4_5_vl_moe": Family(
        "Ernie4_5_VLMoeConfig",
        "Ernie4_5_VLMoeForConditionalGeneration",
        {
            "text_config": {
                "moe_intermediate_size": [16, 12],
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [1, 1, 2],
                },
            }
        },
    ),
    "exaone_moe": Family("ExaoneMoeConfig", "ExaoneMoeForCausalLM"),
    "flex_olmo": Family("FlexOlmoConfig", "FlexOlmoForCausalLM"),
    "flint": Family("FlintConfig", "FlintForCausalLM", {"mlp_only_layers": [0]}),
    "gemma4": Family(
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            "enable_moe_block": True,
            "top_k_experts": 2,
            "vocab_size_per_layer_input": 64,
            "hidden_size_per_layer_input": 8,
            "global_head_dim": 8,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    "glm4_moe": Family("Glm4MoeConfig", "Glm4MoeForCausalLM"),
    "glm4_moe_lite": Family("Glm4MoeLiteConfig", "Glm4MoeLiteForCausalLM", MLA),
    "glm4v_moe": Family(
        "Glm4vMoeConfig",
        "Glm4vMoeForConditionalGeneration",
        {
            "text_config": {
                "num_attention_heads": 2,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 0.5,
                    "mrope_section": [2, 1, 1],
                },
            }
        },
    ),
    "glm5_next": Family(
        "Glm5NextConfig",
        "Glm5NextForConditionalGeneration",
        {
            "text_config": MLA
            | {
                "qk_rope_head_dim": 0,
                "index_kpool": 2,
                "layer_types": ["linear_attention", "indexed_attention", "indexed_attention"],
            }
        },
    ),
    "glm_moe_dsa": Family("GlmMoeDsaConfig", "GlmMoeDsaForCausalLM", MLA),
    "gpt_oss": Family("GptOssConfig", "GptOssForCausalLM"),
    "granitemoe": Family("GraniteMoeConfig", "GraniteMoeForCausalLM"),
    "granitemoe_swa": Family("GraniteMoeSWAConfig", "GraniteMoeSWAForCausalLM"),
    "granitemoehybrid": Family(
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        HYBRID | {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_chunk_size": 8},
    ),
    "granitemoeshared": Family("GraniteMoeSharedConfig", "GraniteMoeSharedForCausalLM"),
    "hunyuan_v1_moe": Family("HunYuanMoEV1Config", "HunYuanMoEV1ForCausalLM"),
    "hy_v3": Family("HYV3Config", "HYV3ForCausalLM"),
    "hy_v4": Family("HYV4Config", "HYV4ForCausalLM", MLA),
    "inkling": Family("InklingTextConfig", "InklingForCausalLM", SWA),
    "inkling2": Family("Inkling2TextConfig", "Inkling2ForCausalLM", SWA),
    "jamba": Family(
        "JambaConfig",
        "JambaForCausalLM",
        {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    ),
    "jetmoe": Family("JetMoeConfig", "JetMoeForCausalLM", {"kv_channels": 8}),
    "kimi_linear": Family("KimiLinearConfig", "KimiLinearForCausalLM", MLA | HYBRID),
    "kolibri1": Family("Kolibri1Config", "Kolibri1ForCausalLM"),
    "laguna": Family("LagunaConfig", "LagunaForCausalLM"),
    "lfm2_moe": Family(
        "Lfm2MoeConfig", "Lfm2MoeForCausalLM", {"layer_types": ["conv", "conv", "full_attention"]}
    ),
    "llama4": Family("Llama4TextConfig", "Llama4ForCausalLM", {"num_experts_per_tok": 1}),
    "longcat_flash": Family(
        "LongcatFlashConfig",
        "LongcatFlashForCausalLM",
        MLA | {"num_layers": 2, "ffn_hidden_size": 24, "expert_ffn_hidden_size": 16, "zero_expert_num": 2},
    ),
    "mellum": Family("MellumConfig", "MellumForCausalLM"),
    "mimo_v2_flash": Family("MiMoV2FlashConfig", "MiMoV2FlashForCausalLM"),
    "minimax": Family("MiniMaxConfig", "MiniMaxForCausalLM"),
    "minimax_m2": Family("MiniMaxM2Config", "MiniMaxM2ForCausalLM"),
    "minimax_m3_vl": Family(
        "MiniMaxM3VLTextConfig", "MiniMaxM3VLForCausalLM", {"dense_intermediate_size": 24, "rotary_dim": 8}
    ),
    "mistral4": Family("Mistral4Config", "Mistral4ForCausalLM", MLA),
    "mistral_large4": Family(
        "MistralLarge4Config", "MistralLarge4ForConditionalGeneration", {"text_config": MLA}
    ),
    "mixtral": Family("MixtralConfig", "MixtralForCausalLM"),
    "muse_spark": Family(
        "MuseSparkConfig",
        "MuseSparkForConditionalGeneration",
        {
            "text_config": {"moe_hidden_size": 24},
            "audio_config": {"num_hidden_layers": 4, "hidden_sizes": [8, 8, 8, 32], "depths": [1, 1, 1, 1]},
        },
    ),
    "nemotron_h": Family(
        "NemotronHConfig",
        "NemotronHForCausalLM",
        {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
            "moe_shared_expert_intermediate_size": 16,
        },
    ),
    "olmoe": Family("OlmoeConfig", "OlmoeForCausalLM"),
    "openai_privacy_filter": Family("OpenAIPrivacyFilterConfig", "OpenAIPrivacyFilterForTokenClassification"),
    "phimoe": Family("PhimoeConfig", "PhimoeForCausalLM"),
    "qwen2_moe": Family("Qwen2MoeConfig", "Qwen2MoeForCausalLM"),
    "qwen3_5_moe": Family("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", HYBRID),
    "qwen3_moe": Family("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {"norm_topk_prob": True}),
    "qwen3_next": Family("Qwen3NextConfig", "Qwen3NextForCausalLM", HYBRID),
    "qwen3_omni_moe": Family(
        "Qwen3OmniMoeThinkerConfig",
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        {
            "vision_start_token_id": 3,
            "audio_config": {
                "encoder_layers": 1,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 24,
                "downsample_hidden_size": 8,
            },
        },
    ),
    "qwen3_vl_moe": Family("Qwen3VLMoeConfig", "Qwen3VLMoeForConditionalGeneration"),
    "qwen4_exp": Family(
        "Qwen4ExpTextConfig",
        "Qwen4ExpForCausalLM",
        {
            "layer_types": ["linear_attention", "indexed_attention", "indexed_attention"],
            "indexer_n_heads": 4,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 4,
            "indexer_compress_ratio": 2,
            "hc_count": 2,
            "hc_lowrank": 8,
        },
    ),
    "solar_open": Family("SolarOpenConfig", "SolarOpenForCausalLM"),
    "step3p7": Family(
        "Step3p7Config",
        "Step3p7ForConditionalGeneration",
        {"text_config": {"share_expert_dim": 16, "sliding_window": 4}},
    ),
    "switch_transformers": Family(
        "SwitchTransformersConfig",
        "SwitchTransformersForConditionalGeneration",
        {
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "d_ff": 24,
            "d_kv": 8,
        },
    ),
    "unlimited_ocr": Family("UnlimitedOcrConfig", "UnlimitedOcrForConditionalGeneration"),
    "zaya": Family("ZayaConfig", "ZayaForCausalLM", {"num_experts_per_tok": 1, "router_hidden_size": 32}),
}

UNSUPPORTED: dict[str, Callable[[], PreTrainedModel]] = {
    "doge": Family("DogeConfig", "DogeForCausalLM", {"is_moe": True}),
    "nllb_moe": Family(
        "NllbMoeConfig",
        "NllbMoeForConditionalGeneration",
        {
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_sparse_step": 2,
            "decoder_sparse_step": 2,
            "encoder_ffn_dim": 16,
            "decoder_ffn_dim": 16,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
        },
    ),
    "vitpose_backbone": Family(
        "VitPoseBackboneConfig",
        "VitPoseBackbone",
        {"num_experts": 3, "part_features": 8, "image_size": [16, 16], "patch_size": [8, 8]},
    ),
}
"""Models that have experts but no routed layer to serve: `expert_layers` refuses them."""
