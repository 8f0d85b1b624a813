"""Checkpoints whose weights are stored in eight bits or four: what turns them into ordinary ones."""

from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig
from transformers.quantizers.auto import AutoHfQuantizer

DEQUANTISED = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}
"""Quantised checkpoints that transformers can turn into ordinary weights while loading."""


def quantisation(config: PreTrainedConfig) -> str | None:
    """How a config says that the weights are stored; None for ordinary ones."""
    return quantisation_table(config).get("quant_method")


def quantisation_table(config: PreTrainedConfig) -> dict[str, Any]:
    """What a config says of that.

    Raises:
        ValueError: Something that is no table.
    """
    table = getattr(config, "quantization_config", None) or {}
    if not isinstance(table, dict) and not hasattr(table, "to_dict"):
        raise ValueError(f"config.json says quantization_config={table!r}, which is not a table")
    return table if isinstance(table, dict) else table.to_dict()


def loading_arguments(config: PreTrainedConfig) -> dict[str, Any]:
    """What `from_pretrained` has to be told, so that weights become ordinary; empty where they are."""
    method = quantisation(config)
    if method not in DEQUANTISED:
        return {}
    return {"quantization_config": getattr(transformers, DEQUANTISED[method])(dequantize=True)}


def dequantiser(config: PreTrainedConfig) -> Any:
    """What transformers converts such weights with, one tensor at a time; None where they are ordinary."""
    if quantisation(config) not in DEQUANTISED:
        return None
    table = quantisation_table(config) | {"dequantize": True}
    return AutoHfQuantizer.from_config(table, pre_quantized=True)


def told(config: PreTrainedConfig, dtype: torch.dtype) -> str:
    """What becomes of quantised weights, to append to a message; empty where they are ordinary."""
    method = quantisation(config)
    name = str(dtype).removeprefix("torch.")
    return f": {method} weights become {name}, in memory and in the result" if method in DEQUANTISED else ""
