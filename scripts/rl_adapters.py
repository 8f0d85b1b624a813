"""LoRA adapters of `moekit rl`."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..moe.discovery import has_experts
from .rl_options import RlOptions

DEFAULT_ALPHA = 2.0
"""Times the rank."""
CARD = "README.md"
EXPERTS_OF_V4 = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
"""Names by which PEFT means fused experts and routers, wherever in a model with experts they are."""


def with_adapters(model: Any, options: RlOptions) -> Any:
    """Put adapters into a model, which is changed; the same ones for the same seed.

    Args:
        model: The policy, or for a trial its skeleton on the meta device.
        options: With a rank; without one the model stays as it is.

    Raises:
        ValueError: PEFT is not installed, or there is no such target.
    """
    if options.lora is None:
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("--lora needs the package peft: pip install 'moekit[rl]'") from error
    alpha: Any = DEFAULT_ALPHA * options.lora if options.lora_alpha is None else options.lora_alpha
    # PEFT's "all-linear" is fused experts and routers, too, in wrappers that hide them from `expert_layers`.
    targets = list(options.lora_targets) or _linear_maps(model)
    config = LoraConfig(r=options.lora, lora_alpha=alpha, target_modules=targets)
    given = f"--lora-targets {' '.join(options.lora_targets) or '(all linear maps)'}"
    torch.manual_seed(options.seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that PEFT itself has added
            adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(f"{given}: {error}") from error
    if fused := config.target_parameters:
        raise ValueError(
            f"{given} cannot be: {', '.join(sorted(fused))} belong to experts or routers, which are no "
            "linear maps and get no adapters; name others, or train without --lora"
        )
    return adapted


def _linear_maps(model: PreTrainedModel) -> list[str]:
    """Those that PEFT will not take for something else; the head is left out, too."""
    head, taken = model.get_output_embeddings(), EXPERTS_OF_V4 if has_experts(model) else frozenset[str]()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and name.rpartition(".")[2] not in taken
    ]


def save_adapters(model: Any, folder: Path, state: dict[str, Any] | None) -> None:
    """Write the adapters alone.

    Args:
        model: PEFT's.
        folder: To make.
        state: All weights, if the model itself holds only a part of them.
    """
    model.save_pretrained(folder, **({} if state is None else {"state_dict": state}))
    (folder / CARD).unlink(missing_ok=True)  # PEFT's form, which nobody has filled in


def merged(model: Any, folder: Path) -> Any:
    """The policy as it was, with adapters from the disk merged into it."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
