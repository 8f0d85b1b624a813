"""Numbers of a step that add up over micro-batches and processes, and the means that are shown of them."""

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Bool, Float
from torch import Tensor


class Sums:
    """Sums and counts by name, on the device where they arise; nothing is read back before `means`.

    A metric that some process has not seen has no count there, and its mean is of those that have.
    """

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}

    def add(self, name: str, total: Float[Tensor, ""], count: Tensor | int | float) -> None:
        """Add a sum of `count` values."""
        pair = torch.stack([total.detach().double(), torch.as_tensor(count, device=total.device).double()])
        self.totals[name] = self.totals[name] + pair if name in self.totals else pair

    def add_rows(self, name: str, values: Float[Tensor, " N"], where: Bool[Tensor, " N"]) -> None:
        """Add the values where they count; NaN never does."""
        counts = where & ~values.isnan()
        self.add(name, torch.where(counts, values, 0.0).sum(), counts.sum())

    def add_tokens(self, metrics: Mapping[str, Float[Tensor, "B L"]], mask: Bool[Tensor, "B L"]) -> None:
        """Add token metrics under a mask."""
        count = mask.sum()
        for name, values in metrics.items():
            self.add(name, torch.where(mask, values, 0.0).sum(), count)

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Of all processes, the same on each; every process calls it."""
        names = sorted(self.totals)
        if accelerator.num_processes > 1:
            names = sorted(set(gather_object(names)))
        device = accelerator.device
        empty = torch.zeros(2, dtype=torch.float64, device=device)
        if not names:
            return {}
        table = torch.stack([self.totals.get(name, empty).to(device) for name in names])
        total: Tensor = accelerator.reduce(table, reduction="sum")  # pyright: ignore[reportAssignmentType]
        sums, counts = total.cpu().T
        return {n: float(s / c) for n, s, c in zip(names, sums, counts, strict=True) if c > 0}
