"""What a candidate for a feed-forward network computes, learnt from running it on a small input.

The calls of its parts tell which projection is the gate and where dropout is applied, on the meta device too.
Away from it, the result must also be that of the weights as read.
"""

# B batch, S sequence, D hidden (model) width, F FFN width

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..weights import ExpertWeights
from .ffn_kinds import Candidate, is_activation, projection_weight

ACTIVATIONS = {nn.functional.silu: nn.SiLU, nn.functional.gelu: nn.GELU, nn.functional.relu: nn.ReLU}
"""Functions that some families call in place of a module."""


class NotAnFFNError(Exception):
    """A candidate computes something else than a feed-forward network; says what."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A feed-forward network as read from a candidate."""

    weights: ExpertWeights
    """Views of the model's parameters."""
    activation: nn.Module
    """Applied to the gate, or to `up` where there is none."""
    dropout: nn.Module | None
    """What a module that is all FFN applies to its own output."""


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of a module, or of a function as the module that does the same."""

    module: nn.Module
    input: Tensor
    output: Tensor


class _Recorder(TorchFunctionMode):
    """Writes down what is called, and makes dropout do nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See PyTorch's ``torch.overrides``."""
        kwargs = kwargs or {}
        if func is nn.functional.dropout:
            self.calls.append(_Call(nn.Dropout(kwargs["p"]), args[0], args[0]))
            return args[0]
        output = func(*args, **kwargs)
        if func in ACTIVATIONS:
            options = {name: value for name, value in kwargs.items() if name == "approximate"}
            self.calls.append(_Call(ACTIVATIONS[func](**options), args[0], output))
        return output

    def hook(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """A forward hook."""
        self.calls.append(_Call(module, args[0], output))


@torch.no_grad()
def read_candidate(candidate: Candidate) -> Reading:
    """Run a candidate and read it.

    Raises:
        NotAnFFNError: It is none, or one with dropout between its neurons.
    """
    weight, whole = projection_weight(candidate.down), candidate.is_whole
    generator = torch.Generator("cpu").manual_seed(0)
    # Named, because loading a checkpoint may have made the meta device the default.
    hidden_BSD = torch.randn(1, 3, weight.shape[0], generator=generator, device="cpu").to(weight)
    calls, result = _record(candidate, hidden_BSD)
    parts = [call.module for call in calls]
    if any(parts.count(part) != 1 for part in (*candidate.inputs, candidate.down)):
        raise NotAnFFNError("it does not call each of its projections once")
    first, last = min(parts.index(part) for part in candidate.inputs), parts.index(candidate.down)
    inside, after = calls[0 if whole else first : last], calls[last:] if whole else []
    projections = [call for call in inside if call.module in candidate.inputs]
    if len(projections) != len(candidate.inputs):
        raise NotAnFFNError("its projections do not follow one another")
    if _dropouts(inside) or len(_dropouts(after)) > 1:
        raise NotAnFFNError("it applies dropout to its neurons; set that dropout to 0 in the configuration")
    activation = _activation(candidate, inside)
    weights = _assemble(candidate, projections, activation)
    expected = result if whole else calls[last].output
    _prove(weights, activation.module, projections[0].input, expected)
    return Reading(weights, activation.module, next(iter(_dropouts(after)), None))


def _record(candidate: Candidate, hidden_BSD: Tensor) -> tuple[list[_Call], Any]:
    """The calls that a run makes, in order, and what it returns."""
    recorder = _Recorder()
    watched = {candidate.down, *candidate.inputs, *filter(is_activation, candidate.owner.modules())}
    handles = [module.register_forward_hook(recorder.hook) for module in watched]
    try:
        with _evaluating(candidate.owner), recorder:
            return recorder.calls, candidate.run(hidden_BSD)
    except Exception as error:  # whatever a layer raises that is not called as its model calls it
        raise NotAnFFNError(f"it does not run on hidden states alone ({error})") from error
    finally:
        for handle in handles:
            handle.remove()


def _dropouts(calls: list[_Call]) -> list[nn.Module]:
    return [call.module for call in calls if isinstance(call.module, nn.Dropout) and call.module.p > 0]


def _activation(candidate: Candidate, calls: list[_Call]) -> _Call:
    """The call of the activation function: of the module if there is one, else of the function."""
    found = [call for call in calls if is_activation(call.module)]
    own = set(candidate.owner.modules())
    found = [call for call in found if call.module in own] or found
    if len(found) != 1:
        raise NotAnFFNError("there is not one activation function between its projections")
    return found[0]


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, and each part's own mode again afterwards."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _assemble(candidate: Candidate, projections: list[_Call], activation: _Call) -> ExpertWeights:
    """The weights by the parts that they play: what the activation function reads is the gate."""
    down = projection_weight(candidate.down)
    width = down.shape[1]
    activated, others = [], []
    for call in projections:
        for start in range(0, call.output.shape[-1], width):
            rows = slice(start, start + width)
            is_activated = _is_same_view(activation.input, call.output[..., rows])
            (activated if is_activated else others).append(_rows(call.module, rows))
    if len(activated) != 1 or len(others) > 1:
        raise NotAnFFNError("its activation function is not applied to one projection")
    (gate, gate_bias), (up, up_bias) = activated[0], others[0] if others else activated[0]
    return ExpertWeights(
        up=up,
        down=down,
        gate=gate if others else None,
        up_bias=up_bias,
        gate_bias=gate_bias if others else None,
        down_bias=_bias(candidate.down),
    )


def _bias(module: nn.Module) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return None if bias is None else bias.detach()


def _rows(module: nn.Module, rows: slice) -> tuple[Tensor, Tensor | None]:
    """The weight and the bias of some neurons."""
    bias = _bias(module)
    return projection_weight(module)[rows], None if bias is None else bias[rows]


def _is_same_view(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same numbers in memory, which the meta device can say too."""
    storages = [t.untyped_storage()._cdata for t in (a, b)]
    return (
        storages[0] == storages[1]
        and a.storage_offset() == b.storage_offset()
        and a.shape == b.shape
        and a.stride() == b.stride()
    )


def _prove(weights: ExpertWeights, activation: nn.Module, hidden: Tensor, expected: Any) -> None:
    """Refuse weights that do not give what the model's own modules gave."""
    linear = nn.functional.linear
    up = linear(hidden, weights.up, weights.up_bias)
    if weights.gate is None:
        neurons = activation(up)
    else:
        neurons = activation(linear(hidden, weights.gate, weights.gate_bias)) * up
    out = linear(neurons, weights.down, weights.down_bias)
    if not isinstance(expected, Tensor) or expected.shape != out.shape:
        raise NotAnFFNError("it returns something else than hidden states")
    if out.is_meta:
        return
    # Rounding is far below this, another formula far above it. Weights not yet loaded may hold anything.
    tolerance = torch.finfo(out.dtype).eps ** 0.5 * expected.abs().max().item()
    if not torch.allclose(out, expected, rtol=0.0, atol=tolerance, equal_nan=True):
        raise NotAnFFNError("it computes something else than down(act(gate(x)) * up(x)) or down(act(up(x)))")
