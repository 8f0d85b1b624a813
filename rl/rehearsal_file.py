"""A rehearsal on the disk, where a run that goes on finds it."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .rehearsal import Rehearsal, RehearsalSample
from .rollout import Prompt
from .settings import PolicySettings

MADE_FROM = "made from"


def rehearsal_origin(prompts: Sequence[Prompt], settings: PolicySettings) -> str:
    """Changes with what a rehearsal depends on, the policy excepted."""
    names = ("rehearsal_generations", "rehearsal_threshold", "pass_at", "seed", "sampling")
    digest = hashlib.sha256(repr([getattr(settings, name) for name in names]).encode())
    for prompt in prompts:
        digest.update(np.array([len(prompt.ids), *prompt.ids], dtype=np.int64).tobytes())
    return digest.hexdigest()


def write_rehearsal(path: Path, rehearsal: Rehearsal, origin: str) -> None:
    """Save as safetensors, whole or not at all.

    Args:
        path: Of the file.
        rehearsal: What is saved.
        origin: See `rehearsal_origin`.
    """
    samples = rehearsal.samples
    tensors = {
        "explored": torch.tensor(rehearsal.explored, dtype=torch.long),
        "prompts": torch.tensor([s.prompt for s in samples], dtype=torch.long),
        "lengths": torch.tensor([len(s.completion_ids) for s in samples], dtype=torch.long),
        "ids": torch.tensor([i for s in samples for i in s.completion_ids], dtype=torch.long),
        "logprobs": torch.cat([torch.zeros(0), *(s.logprobs for s in samples)]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, temporary, metadata={MADE_FROM: origin})
    temporary.replace(path)


def read_rehearsal(path: Path, origin: str) -> Rehearsal | None:
    """What `write_rehearsal` wrote; ``None`` if there is no such file.

    Args:
        path: Of the file.
        origin: See `rehearsal_origin`.

    Raises:
        ValueError: It is damaged, or of other prompts or settings.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        lengths = tensors["lengths"].tolist()
        ids, logprobs = tensors["ids"].split(lengths), tensors["logprobs"].split(lengths)
        samples = tuple(
            RehearsalSample(prompt=prompt, completion_ids=tuple(i.tolist()), logprobs=lp)
            for prompt, i, lp in zip(tensors["prompts"].tolist(), ids, logprobs, strict=True)
        )
        found = Rehearsal(explored=tuple(tensors["explored"].tolist()), samples=samples)
    except (SafetensorError, OSError, ValueError, LookupError, RuntimeError) as error:
        raise ValueError(f"'{path}' is damaged; remove it to sample the initial policy again") from error
    if metadata.get(MADE_FROM) != origin:
        raise ValueError(
            f"'{path}' was made from other prompts or settings; take another folder, or remove the file to "
            "sample the initial policy again"
        )
    return found
