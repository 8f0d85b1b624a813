"""The dense baseline of SMoE-Dropout: ordinary dropout within each FFN."""

from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .dense_ffn import dense_ffns


def add_ffn_dropout(model: PreTrainedModel, p: float) -> list[RemovableHandle]:
    """Drop hidden activations of each dense FFN, in training mode, where the down projection reads them.

    The model's weights, its config and its checkpoints stay those of the dense model. Copies of the model
    drop as well; what `from_pretrained` loads does not.

    Args:
        model: Any model whose FFNs `dense_ffns` finds.
        p: Probability of an activation to be dropped, from 0 up to but not 1.

    Returns:
        For each FFN a handle, whose ``remove()`` ends the dropout.

    Raises:
        UnsupportedModelError: No dense FFN is found.
        ValueError: `p` is out of range.

    Reference: the dense baseline of Chen et al., Sparse MoE as the New Dropout, arXiv:2303.01610.
    """
    if not 0 <= p < 1:
        raise ValueError(f"p={p} is not a probability of at least 0 and less than 1")
    return [ffn.down_projection.register_forward_pre_hook(partial(_drop, p=p)) for ffn in dense_ffns(model)]


def _drop(module: nn.Module, args: tuple[Any, ...], *, p: float) -> tuple[Any, ...]:
    return nn.functional.dropout(args[0], p, module.training), *args[1:]
