"""The weights of one expert, in one orientation whatever a family stores."""

# D hidden (model) width, F FFN width

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One expert: ``down @ (act(gate @ x) * (up @ x))``, or ``down @ act(up @ x)`` without a gate.

    The tensors are views of the model's parameters, never copies: writing to them writes to the model.
    """

    up: Tensor
    """``[F, D]``."""
    down: Tensor
    """``[D, F]``."""
    gate: Tensor | None = None
    """``[F, D]``, ``None`` for an expert without a gate."""
    up_bias: Tensor | None = None
    """``[F]``."""
    gate_bias: Tensor | None = None
    """``[F]``."""
    down_bias: Tensor | None = None
    """``[D]``."""

    @property
    def hidden_size(self) -> int:
        """D, the width of the input and the output."""
        return self.up.shape[1]

    @property
    def width(self) -> int:
        """F, the number of neurons."""
        return self.up.shape[0]

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the tensor of everything that this expert has."""
        for name in self.__dataclass_fields__:
            tensor = getattr(self, name)
            if tensor is not None:
                yield name, tensor

    def copy_(self, other: "ExpertWeights") -> None:
        """Write the values of `other` into these views.

        Raises:
            ValueError: `other` has other tensors or other shapes.
        """
        mine, theirs = dict(self.named_tensors()), dict(other.named_tensors())
        shapes = {name: tuple(t.shape) for name, t in mine.items()}
        other_shapes = {name: tuple(t.shape) for name, t in theirs.items()}
        if shapes != other_shapes:
            raise ValueError(f"an expert of shapes {other_shapes} does not fit a layer of experts {shapes}")
        for name, tensor in mine.items():
            tensor.copy_(theirs[name])
