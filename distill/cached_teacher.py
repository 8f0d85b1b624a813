"""A teacher that is not in memory: what it said once, read from the disk."""

from collections.abc import Mapping
from typing import Any

import torch

from .fused import TeacherStates
from .losses import ValidRows
from .teacher_cache import CachedRows, TeacherCache
from .teachers import Said, TopK


class CachedTeacher:
    """What a teacher said once of the same examples.

    Args:
        cache: Of hidden states, likeliest tokens, or logits.
        device: Where to bring it.
    """

    def __init__(self, cache: TeacherCache, device: torch.device) -> None:
        self.cache, self.device = cache, device
        head = cache.head
        self.head = None if head is None else head.to(device)

    def says(self, batch: Mapping[str, Any], rows: ValidRows | None) -> Said:
        """Read.

        Raises:
            ValueError: The cache has another number of rows for these examples.
        """
        found: CachedRows = self.cache.read(batch["row"].cpu())
        if rows is not None and int(found.num_rows.sum()) != len(rows):
            raise ValueError(
                f"the teacher cache has {int(found.num_rows.sum())} rows for a batch of which {len(rows)} "
                "count: it was made of other data; give another --cache folder"
            )
        tensors = {name: tensor.to(self.device) for name, tensor in found.tensors.items()}
        if self.head is not None:
            return TeacherStates(tensors["hidden"], self.head)
        if "ids" in tensors:
            return TopK(tensors["log_probs"].float(), tensors["ids"].long())
        return tensors["logits"]
