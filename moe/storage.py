"""Where each family keeps its experts: read one as views, make room for another number of them.

Transformers v5 marks its fused experts with four flags, so one class reads about sixty families. The other
classes are for what is not marked: experts as modules (Switch), as one flat matrix (DBRX), or in two
parallel linear layers (JetMoE).
"""

# E experts, M kept or merged experts, D hidden (model) width, F FFN width

import copy
import re
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .dropout.experts import SlicedExperts
from .low_rank import LowRankStorage
from .weights import ExpertWeights

# Not num_experts_per_tok, expert_capacity, expert_dim, zero_expert_num or n_shared_experts.
_COUNT_NAME = re.compile(r"(num|n|total)_(?!shared)(\w*_)?(experts|classes)")


@runtime_checkable
class ExpertStorage(Protocol):
    """How one MoE layer keeps its experts."""

    def __len__(self) -> int:
        """Number of experts that are physically there."""
        ...

    def read(self, expert: int) -> ExpertWeights:
        """Views of one expert."""
        ...

    def allocate(self, num_experts: int) -> None:
        """Replace the parameters by uninitialised ones for `num_experts` experts."""
        ...


def find_storage(module: nn.Module) -> ExpertStorage | None:
    """Return how `module` stores experts, or ``None`` when it is no container of routed experts."""
    for storage in (
        LowRankStorage,
        SlicedStorage,
        FusedStorage,
        ModuleStorage,
        FlatStorage,
        ParallelLinearStorage,
    ):
        if storage.matches(module):
            return storage(module)
    return None


def _resized(parameter: nn.Parameter, rows: int) -> nn.Parameter:
    shape = (rows, *parameter.shape[1:])
    return nn.Parameter(parameter.new_empty(shape), requires_grad=parameter.requires_grad)


def expert_counts(module: nn.Module) -> dict[str, int]:
    """The integer attributes of `module` that count routed experts, or what a router chooses among."""
    return {n: v for n, v in vars(module).items() if type(v) is int and _COUNT_NAME.fullmatch(n)}


def _set_counts(module: nn.Module, old: int, new: int) -> None:
    """Change the integer attributes of `module` that count its experts."""
    for name, value in expert_counts(module).items():
        if value == old:
            setattr(module, name, new)


def _num_rows(parameter: Any) -> int:
    """Also where DeepSpeed ZeRO-3 has left nothing of it in this process."""
    return getattr(parameter, "ds_shape", parameter.shape)[0]


class FusedStorage:
    """Experts fused along the first axis: ``gate_up_proj [E, 2F, D]`` and ``down_proj [E, D, F]``.

    The flags that transformers sets (``has_gate``, ``has_bias``, ``is_transposed``, ``is_concatenated``)
    say the rest; where they are missing (Llama-4, LongCat, Step-3.7) the shapes do.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.has_gate: bool = getattr(module, "has_gate", hasattr(module, "gate_up_proj"))
        self.has_bias: bool = getattr(module, "has_bias", False)
        self.is_concatenated: bool = getattr(module, "is_concatenated", True)
        up, down = getattr(self.module, self._up_name), self.module.down_proj
        self.is_transposed: bool = getattr(module, "is_transposed", up.shape[2] != down.shape[1])

    @staticmethod
    def matches(module: nn.Module) -> bool:
        """Whether `module` holds fused 3-D parameters."""
        own = dict(module.named_parameters(recurse=False))
        up = own.get("gate_up_proj", own.get("up_proj"))
        return up is not None and up.ndim == 3 and "down_proj" in own and "gate_proj" not in own

    @property
    def _up_name(self) -> str:
        return "gate_up_proj" if self.has_gate else "up_proj"

    def __len__(self) -> int:
        return _num_rows(self.module.down_proj)

    def _split(self, fused: Tensor) -> tuple[Tensor | None, Tensor]:
        if not self.has_gate:
            return None, fused
        if self.is_concatenated:
            half = fused.shape[0] // 2
            return fused[:half], fused[half:]
        return fused[0::2], fused[1::2]

    def read(self, expert: int) -> ExpertWeights:
        """Views of one expert."""
        fused = getattr(self.module, self._up_name).detach()[expert]
        down = self.module.down_proj.detach()[expert]
        if self.is_transposed:
            fused, down = fused.T, down.T
        gate, up = self._split(fused)
        if not self.has_bias:
            return ExpertWeights(up=up, down=down, gate=gate)
        gate_bias, up_bias = self._split(getattr(self.module, self._up_name + "_bias").detach()[expert])
        down_bias = self.module.down_proj_bias.detach()[expert]
        return ExpertWeights(up, down, gate, up_bias, gate_bias, down_bias)

    def allocate(self, num_experts: int) -> None:
        """Replace the parameters by uninitialised ones for `num_experts` experts."""
        old = len(self)
        _set_counts(self.module, old, num_experts)
        for name, parameter in list(self.module.named_parameters(recurse=False)):
            extra = parameter.shape[0] - old
            resized = _resized(parameter, num_experts + extra)
            if extra:  # LongCat's gate_up_proj has rows for its weightless experts too
                resized.data[num_experts:] = parameter.data[old:]
                self.module.total_experts = num_experts + extra
            setattr(self.module, name, resized)


class SlicedStorage(FusedStorage):
    """The experts of an SMoE-Dropout layer, which say themselves how to be read."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    @staticmethod
    def matches(module: nn.Module) -> bool:
        """Whether `module` is moekit's own."""
        return isinstance(module, SlicedExperts)

    def read(self, expert: int) -> ExpertWeights:
        """Views of one expert."""
        return self.module.expert(expert)


class ModuleStorage:
    """Experts as modules ``expert_0``, ``expert_1``, ... of two linear layers each (Switch, NLLB)."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    @staticmethod
    def matches(module: nn.Module) -> bool:
        """Whether `module` is a dictionary of expert modules."""
        return isinstance(module, nn.ModuleDict) and "expert_0" in module

    def __len__(self) -> int:
        return len(self.module)

    def read(self, expert: int) -> ExpertWeights:
        """Views of one expert."""
        linears = [m for m in self.module[f"expert_{expert}"].modules() if isinstance(m, nn.Linear)]
        up, down = linears
        return ExpertWeights(
            up=up.weight.detach(),
            down=down.weight.detach(),
            up_bias=None if up.bias is None else up.bias.detach(),
            down_bias=None if down.bias is None else down.bias.detach(),
        )

    def allocate(self, num_experts: int) -> None:
        """Replace the modules by copies of the first, for `num_experts` experts."""
        old, template = len(self), self.module["expert_0"]
        for name in list(self.module):
            del self.module[name]
        for expert in range(num_experts):
            self.module[f"expert_{expert}"] = copy.deepcopy(template)
        _set_counts(self.module, old, num_experts)


class FlatStorage:
    """Experts as rows of flat matrices ``w1, v1, w2 [E * F, D]`` (DBRX): gate, up and transposed down."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    @staticmethod
    def matches(module: nn.Module) -> bool:
        """Whether `module` holds DBRX's three flat matrices."""
        mlp = getattr(module, "mlp", None)
        return mlp is not None and all(
            isinstance(getattr(mlp, n, None), nn.Parameter) for n in ("w1", "v1", "w2")
        )

    def __len__(self) -> int:
        return self.module.num_experts

    def read(self, expert: int) -> ExpertWeights:
        """Views of one expert."""
        mlp = self.module.mlp
        gate, up, down = (
            w.detach().view(len(self), -1, w.shape[1])[expert] for w in (mlp.w1, mlp.v1, mlp.w2)
        )
        return ExpertWeights(up=up, down=down.T, gate=gate)

    def allocate(self, num_experts: int) -> None:
        """Replace the parameters by uninitialised ones for `num_experts` experts."""
        old, mlp = len(self), self.module.mlp
        for name in ("w1", "v1", "w2"):
            parameter = getattr(mlp, name)
            setattr(mlp, name, _resized(parameter, parameter.shape[0] // old * num_experts))
        _set_counts(mlp, old, num_experts)
        _set_counts(self.module, old, num_experts)


class ParallelLinearStorage:
    """Experts in two parallel linear layers, ``[E, 2F, D]`` and ``[E, D, F]`` (JetMoE)."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    @staticmethod
    def matches(module: nn.Module) -> bool:
        """Whether `module` holds JetMoE's two parallel linear layers and their router."""
        up, down = (
            getattr(getattr(module, n, None), "weight", None) for n in ("input_linear", "output_linear")
        )
        # JetMoE's attention experts share these names but run them apart: `map` before, `reduce` after.
        return up is not None and down is not None and up.ndim == 3 and not hasattr(module, "map")

    def __len__(self) -> int:
        return _num_rows(self.module.input_linear.weight)

    def read(self, expert: int) -> ExpertWeights:
        """Views of one expert."""
        gate, up = self.module.input_linear.weight.detach()[expert].chunk(2)
        return ExpertWeights(up=up, down=self.module.output_linear.weight.detach()[expert], gate=gate)

    def allocate(self, num_experts: int) -> None:
        """Replace the parameters by uninitialised ones for `num_experts` experts."""
        old = len(self)
        for linear in (self.module.input_linear, self.module.output_linear):
            linear.weight = _resized(linear.weight, num_experts)
            _set_counts(linear, old, num_experts)


def _shapes(expert: ExpertWeights) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in expert.named_tensors()}


@torch.no_grad()
def write_experts(storage: ExpertStorage, experts: list[ExpertWeights]) -> None:
    """Make `storage` hold exactly `experts`, which may be views of what it holds now.

    Raises:
        ValueError: An expert has other tensors or other shapes; nothing is changed.
    """
    if "constant_outputs" in getattr(storage, "module", nn.Module())._buffers:
        raise ValueError(
            "a layer with constant experts cannot be changed again; start from the original model"
        )
    present = _shapes(storage.read(0))
    for expert in experts:
        if _shapes(expert) != present:
            raise ValueError(
                f"an expert of shapes {_shapes(expert)} does not fit a layer of experts {present}"
            )
    storage.allocate(len(experts))
    for index, expert in enumerate(experts):
        storage.read(index).copy_(expert)
