"""The load of frozen random routers, balanced once by the mean of what they read."""

# T tokens, D hidden (model) width, E experts

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from ..evaluating import evaluating
from .convert import require_smoe_layers
from .load import RelativeLoad, add_choices
from .observe import RoutedTokens, observe_routers


@dataclass(frozen=True, slots=True)
class CenteredLoad:
    """The load of one layer's experts at the present K, on the batches that centred it."""

    before: RelativeLoad
    after: RelativeLoad


class _Sums:
    """Input sum in float64 and choices of every layer, over the batches of one pass."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.inputs: dict[str, Float[Tensor, " D"]] = {}
        self.choices: dict[str, Tensor] = {}
        self.num_tokens: dict[str, Tensor] = {}
        for name, layer in require_smoe_layers(model).items():
            weight: Any = layer.router.weight
            self.inputs[name] = weight.new_zeros(weight.shape[1], dtype=torch.float64)
            self.choices[name] = weight.new_zeros(len(weight), dtype=torch.int64)
            self.num_tokens[name] = weight.new_zeros((), dtype=torch.int64)

    def add(self, routed: RoutedTokens) -> None:
        hidden_TD = routed.hidden_states if routed.counted is None else routed.hidden_states[routed.counted]
        self.inputs[routed.layer] += hidden_TD.sum(0, dtype=torch.float64)
        self.num_tokens[routed.layer] += len(hidden_TD)
        add_choices(self.choices[routed.layer], routed)

    def loads(self) -> dict[str, RelativeLoad]:
        """Of the layers that ran."""
        return {name: RelativeLoad.of(counts_E) for name, counts_E in self.choices.items() if counts_E.any()}


@torch.no_grad()
def center_routers(model: PreTrainedModel, batches: Iterable[dict[str, Any]]) -> dict[str, CenteredLoad]:
    """Give each frozen router the constant bias ``-R E[x]``, so that the mean input prefers no expert.

    Without it the mean of x, which is the same for all tokens, decides much of the choice, and at small K
    some experts get nearly all tokens. The bias is set once and saved with the model; nothing is learned.

    One pass over the batches finds the means of all layers under the routing as it is, a second the load
    that results. In that one a layer reads what the layers before it now compute; where this shifts its
    mean, as it can at small K, calling again comes closer.

    Args:
        model: What `to_smoe_dropout` returned, on the device of the batches.
        batches: Keyword arguments of the model, without padding or with an ``attention_mask``. It is run
            through twice: a list, or a data loader in fixed order, not a generator.

    Returns:
        The load by layer, at the model's present K. At K = E it is always even: `set_active_experts` first.
        Layers that the batches did not reach are left out, and as they were.

    Raises:
        UnsupportedModelError: The model has no SMoE-Dropout layers.
        ValueError: The routers are not frozen random ones, `batches` can be run through only once, or no
            token came. Nothing is changed then.

    Reference: moekit's own addition to Chen et al. (ICLR 2023), arXiv:2303.01610, whose routers have no bias.
    """
    routers: dict[str, Any] = {name: layer.router for name, layer in require_smoe_layers(model).items()}
    for name, router in routers.items():
        if router.kind != "random":
            raise ValueError(
                f"layer {name!r} has router={router.kind!r}; only frozen random ones are centred"
            )
    if isinstance(batches, Iterator):
        raise ValueError("batches can be run through only once; pass list(batches)")
    before = _run(model, batches)
    if not before.loads():
        raise ValueError("batches has no token that is not padding")
    for name, router in routers.items():
        if before.num_tokens[name]:
            mean_D = before.inputs[name] / before.num_tokens[name]
            router.bias.copy_(-(router.weight.double() @ mean_D))
    loads_after = _run(model, batches).loads()
    return {name: CenteredLoad(load, loads_after[name]) for name, load in before.loads().items()}


def _run(model: PreTrainedModel, batches: Iterable[dict[str, Any]]) -> _Sums:
    sums = _Sums(model)
    with evaluating(model), observe_routers(model, sums.add):
        for batch in batches:
            model(**batch)
    return sums
