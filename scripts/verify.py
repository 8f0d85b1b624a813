"""Read a written checkpoint back as its users will, and make sure that it is the model that was in memory."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..moe.checkpoint import max_logit_difference
from ..moe.data import TokenBlocks
from ..moe.evaluating import evaluating
from .calibrate import model_inputs
from .load import SCAN_ELEMENTS, load_model

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5}
"""Largest difference of logits, relative to the largest logit: the same weights at other addresses may be
multiplied by another kernel."""
LOW_PRECISION_TOLERANCE = 2e-2
PROBES = 2


class VerificationError(ValueError):
    """The checkpoint on disk is not the model that was in memory."""


def verify_reload(model: PreTrainedModel, folder: Path, blocks: TokenBlocks) -> tuple[PreTrainedModel, float]:
    """Load a checkpoint by `from_pretrained` and compare it with the model that it was written from.

    Args:
        model: The model in memory.
        folder: Its checkpoint.
        blocks: Text to compare the logits on; the first two blocks are used.

    Returns:
        The loaded model, and the largest difference of a logit relative to the largest logit.

    Raises:
        VerificationError: A tensor is missing, added or changed, or the logits differ by more than rounding.
    """
    reloaded = load_model(str(folder), device=str(model.device))
    _compare_tensors(model, reloaded)
    batch = next(blocks.batches(PROBES))
    with evaluating(model), evaluating(reloaded):
        difference = max_logit_difference(model, reloaded, model_inputs(model, batch))
    check_difference(difference, model.dtype)
    return reloaded, difference


def check_difference(difference: float, dtype: torch.dtype) -> None:
    """Refuse logits that differ by more than rounding.

    Args:
        difference: The largest, relative to the largest logit.
        dtype: Of the weights.

    Raises:
        VerificationError: They do.
    """
    allowed = TOLERANCE.get(dtype, LOW_PRECISION_TOLERANCE)
    if not difference <= allowed:
        raise VerificationError(
            f"the checkpoint read back gives other logits than the model in memory (relative difference "
            f"{difference:.2g}, at most {allowed:g} is rounding); this is a fault of moekit, please report it"
        )


def check_digests(mine: Mapping[str, str], theirs: Mapping[str, str]) -> None:
    """Refuse other tensors than those in memory.

    Args:
        mine: Of the tensors in memory, by their names, as `digests` gives them.
        theirs: Of those read back.

    Raises:
        VerificationError: A tensor is missing, added or changed.
    """
    _check_names(mine, theirs)
    for name, digest in mine.items():
        if theirs[name] != digest:
            raise VerificationError(_changed(name))


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Hash of each tensor's type, shape and bytes."""
    found = {}
    for name, tensor in tensors.items():
        seen = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
        for part in tensor.detach().reshape(-1).split(SCAN_ELEMENTS):
            seen.update(part.cpu().contiguous().view(torch.uint8).numpy().data)
        found[name] = seen.hexdigest()[:32]
    return found


def _check_names(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    if different := sorted(mine.keys() ^ theirs.keys()):
        raise VerificationError(
            f"tensor {different[0]!r} is in only one of the model in memory and the checkpoint read back; "
            "this is a fault of moekit, please report it"
        )


def _changed(name: str) -> str:
    return (
        f"tensor {name!r} was changed by writing and reading it; this is a fault of moekit, please report it"
    )


def _compare_tensors(model: PreTrainedModel, reloaded: PreTrainedModel) -> None:
    mine, theirs = model.state_dict(), reloaded.state_dict()
    _check_names(mine, theirs)
    for name, tensor in mine.items():
        # Values, not types: Switch turns its routers' weights into float32 when they are first used.
        if not torch.equal(tensor.to(theirs[name].dtype), theirs[name]) or not torch.equal(
            theirs[name].to(tensor.dtype), tensor
        ):
            raise VerificationError(_changed(name))
