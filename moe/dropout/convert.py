"""Dense models made sparse and self-slimmable: `to_smoe_dropout`, and the setter of the active experts."""

# E experts, D hidden (model) width, I expert width, F dense FFN width

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoint import configured_experts, mark_form
from ..discovery import UnsupportedModelError
from ..weights import ExpertWeights
from .build import DropoutSpec, build_layer, fill_experts, one_k_each, smoe_layers
from .dense_ffn import DenseFFN, dense_ffns
from .hash_router import hand_out_token_ids
from .layer import SMoEDropout
from .partition import check_divides, contiguous_partition, random_partition, weight_partition
from .router import LOGIT_STD, Combine
from .schedule import check_active
from .upcycling import drop_upcycle

Start = Literal["carve", "copy"]
Partition = Int[Tensor, "E I"]

PARTITIONS = {
    "contiguous": lambda weights, num_experts, seed: contiguous_partition(weights.width, num_experts),
    "random": lambda weights, num_experts, seed: random_partition(weights.width, num_experts, seed=seed),
    "weights": lambda weights, num_experts, seed: weight_partition(weights, num_experts, seed=seed),
}
"""How neurons are dealt to experts by what the weights alone say."""


@torch.no_grad()
def to_smoe_dropout(
    model: PreTrainedModel,
    num_experts: int = 16,
    combine: Combine = "softmax",
    seed: int = 0,
    *,
    active_experts: int | None = None,
    start: Start = "carve",
    partition: str | Sequence[Partition] = "contiguous",
    drop_fraction: float = 0.0,
    router: str = "random",
    layers: Sequence[int] | None = None,
    logit_std: float = LOGIT_STD,
    scale: float | None = None,
) -> PreTrainedModel:
    """Turn the FFNs of a dense model into SMoE-Dropout layers, in place.

    With ``start="carve"`` each FFN is cut into E experts of width F / E: as many parameters as before, and at
    K = E the dense model again, exactly for ``uniform`` and ``residual``, nearly for ``softmax``, whose
    weights differ from 1 / E as the random logits do. With ``start="copy"`` (sparse up-cycling) each expert
    is the whole FFN, so the model is the dense one at every K, until `drop_fraction` (Drop-Upcycling) or
    training makes the experts differ.

    Args:
        model: Any decoder, encoder or vision model whose FFNs `dense_ffns` finds; new or pretrained.
        num_experts: E.
        combine: How the chosen experts are weighed (`SMoERouter`).
        seed: Of the routers, the random partitions and Drop-Upcycling.
        active_experts: K to begin with; E by default.
        start: ``carve`` or ``copy``.
        partition: For ``carve``, which neurons form an expert: ``contiguous``, ``random``, ``weights``
            (balanced clusters of similar neurons), or one ``[E, I]`` index tensor for each FFN, such as
            `coactivation_partitions` makes.
        drop_fraction: For ``copy``, the share of each expert's neurons drawn anew, in [0, 1].
        router: ``random`` and frozen, or one of the baselines in `ROUTERS`; for ``analytic`` call `to_cmoe`,
            which also says what it routes by.
        layers: Which FFNs to convert, counted from 0; all by default.
        logit_std: Of the router's logits for hidden states of unit mean square.
        scale: What the routing weights sum to; by default E for carved experts, whose plain sum is the FFN,
            and 1 for copies.

    Returns:
        The model.

    Raises:
        UnsupportedModelError: No dense FFN is found.
        ValueError: E does not divide an FFN's width, or an argument is out of range. Nothing is changed then.
    """
    _check_model(model)
    if type(num_experts) is not int or num_experts < 2:
        raise ValueError(f"num_experts={num_experts!r} is not an integer of at least 2")
    if layers is not None and not len(layers):
        raise ValueError("layers names none; leave it out to convert all")
    ffns = dense_ffns(model, layers)
    _check_arguments(num_experts, combine, start, drop_fraction, logit_std)
    if (router, combine) == ("learned", "uniform"):
        raise ValueError("router='learned' gets no gradient from combine='uniform'; use softmax or residual")
    active = num_experts if active_experts is None else active_experts
    check_active("active_experts", active, num_experts)
    spec = DropoutSpec(
        num_experts=num_experts,
        router=router,
        combine=combine,
        scale=_default_scale(start, combine, num_experts) if scale is None else scale,
        widths={ffn.name: _expert_width(ffn, num_experts, start) for ffn in ffns},
    )
    deals = _deal_neurons(ffns, spec, start, partition, seed)
    for index, ffn in enumerate(ffns):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        layer = build_layer(ffn, spec, spec.widths[ffn.name], model.config)
        layer.router.draw(generator, logit_std)
        if start == "carve":
            fill_experts(layer, _slices(ffn.weights, next(deals)))
        else:
            experts = (drop_upcycle(ffn.weights, drop_fraction, generator) for _ in range(num_experts))
            fill_experts(layer, map(_without_output_bias, experts))
        layer.train(model.training)
        ffn.replace(model, layer)
    hand_out_token_ids(model)
    set_active_experts(model, active)
    mark_form(model)
    return model


def _check_model(model: PreTrainedModel) -> None:
    """Refuse a model whose config counts experts already, or whose weights are not what they seem."""
    name = type(model).__name__
    if smoe_layers(model):
        raise UnsupportedModelError(f"{name} has SMoE-Dropout layers already")
    if configured_experts(model.config) is not None:
        raise UnsupportedModelError(f"{name} is a Mixture-of-Experts model already: use moekit compress")
    method = getattr(getattr(model.config, "quantization_config", None), "quant_method", None)
    if method is not None and method != "gguf":  # whose weights are ordinary ones once they are loaded
        raise UnsupportedModelError(f"{name} is quantised ({method}); load it in float32 or bfloat16")


def _check_arguments(num_experts: int, combine: str, start: str, drop: float, logit_std: float) -> None:
    if start not in ("carve", "copy"):
        raise ValueError(f"start={start!r} is not carve or copy")
    if start == "copy" and combine == "residual":
        raise ValueError(
            "combine='residual' adds whole experts up, which only slices of one FFN allow; use softmax or "
            "uniform with start='copy'"
        )
    if start == "carve" and drop:
        raise ValueError(f"drop_fraction={drop} is for start='copy'; a carved FFN keeps all its neurons")
    if not 0 <= drop <= 1:
        raise ValueError(f"drop_fraction={drop} is not between 0 and 1")
    if not 0 <= logit_std < float("inf"):
        raise ValueError(f"logit_std={logit_std} is not a finite number of at least 0")


def _expert_width(ffn: DenseFFN, num_experts: int, start: str) -> int:
    if start == "copy":
        return ffn.weights.width
    check_divides(ffn.weights.width, num_experts)
    return ffn.weights.width // num_experts


def _default_scale(start: str, combine: str, num_experts: int) -> float:
    return float(num_experts) if start == "carve" and combine != "residual" else 1.0


def _deal_neurons(
    ffns: list[DenseFFN], spec: DropoutSpec, start: str, partition: str | Sequence[Partition], seed: int
) -> Iterator[Partition]:
    """Yield the partition of each FFN; what is given is checked before the first is used."""
    if isinstance(partition, str):
        if partition not in PARTITIONS:
            raise ValueError(f"partition={partition!r} is not one of {', '.join(PARTITIONS)}")
        return (
            PARTITIONS[partition](ffn.weights, spec.num_experts, seed + index)
            for index, ffn in enumerate(ffns)
        )
    if start != "carve" or len(partition) != len(ffns):
        raise ValueError(f"{len(partition)} partitions are given for start={start!r} and {len(ffns)} FFNs")
    for ffn, deal_EI in zip(ffns, partition, strict=True):
        wanted = torch.arange(ffn.weights.width)
        if len(deal_EI) != spec.num_experts or not torch.equal(deal_EI.flatten().sort().values.cpu(), wanted):
            raise ValueError(
                f"the partition given for {ffn.name!r} must deal each of its {ffn.weights.width} neurons to "
                f"one of {spec.num_experts} experts of equal width"
            )
    return iter(partition)


def _slices(weights: ExpertWeights, deal_EI: Partition) -> Iterator[ExpertWeights]:
    for neurons in deal_EI.to(weights.up.device):
        yield ExpertWeights(
            up=weights.up[neurons],
            down=weights.down[:, neurons],
            gate=None if weights.gate is None else weights.gate[neurons],
            up_bias=None if weights.up_bias is None else weights.up_bias[neurons],
            gate_bias=None if weights.gate_bias is None else weights.gate_bias[neurons],
        )


def _without_output_bias(weights: ExpertWeights) -> ExpertWeights:
    return ExpertWeights(weights.up, weights.down, weights.gate, weights.up_bias, weights.gate_bias)


def require_smoe_layers(model: PreTrainedModel) -> dict[str, SMoEDropout]:
    """The SMoE-Dropout layers of a model that must have some.

    Raises:
        UnsupportedModelError: It has none.
    """
    layers = smoe_layers(model)
    if not layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no SMoE-Dropout layers; convert it with to_smoe_dropout first"
        )
    return layers


def set_active_experts(model: PreTrainedModel, k: int | Sequence[int]) -> None:
    """Set the number of active experts of every layer of an SMoE-Dropout model; takes effect at once.

    The config follows (`num_experts_per_tok`), so what is saved next is loaded with this K.

    Args:
        model: What `to_smoe_dropout` returned, or `from_pretrained` loaded.
        k: From 1 to E; or one for each layer.

    Raises:
        UnsupportedModelError: The model has no SMoE-Dropout layers.
        ValueError: Out of range, or not one for each layer. Nothing is changed then.
    """
    layers = list(require_smoe_layers(model).values())
    ks = one_k_each(k, len(layers))
    before = [layer.active_experts for layer in layers]
    try:
        for layer, active in zip(layers, ks, strict=True):
            layer.active_experts = active
    except ValueError:
        for layer, active in zip(layers, before, strict=True):
            layer.router.top_k = active
        raise
    model.config.num_experts = layers[0].num_experts
    model.config.num_experts_per_tok = ks[0] if len(set(ks)) == 1 else ks
