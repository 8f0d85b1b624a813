"""Plan a model layer by layer, each behind the layers that are compressed already."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel

from ..compress.apply import apply_layer, check_finite
from ..compress.plan import CompressionPlan, ModelIdentity
from ..moe.checkpoint import update_expert_count
from ..moe.data import TokenBlocks
from ..moe.evaluating import evaluating
from ..moe.layer import ExpertLayer
from ..moe.recording import record_routing
from ..moe.samples import record_inputs
from ..moe.statistics import RoutingStatistics
from .calibrate import model_inputs
from .layer_reading import layer_reader
from .processes import Processes

PlanLayers = Callable[..., CompressionPlan]
"""From layers, statistics and samples to a plan of these layers."""


def compress_in_sequence(
    model: PreTrainedModel,
    layers: list[ExpertLayer],
    blocks: TokenBlocks,
    plan_layers: PlanLayers,
    *,
    batch_size: int,
    sample_inputs: bool,
    progress: bool,
    processes: Processes | None = None,
) -> tuple[CompressionPlan, RoutingStatistics, dict[str, dict[str, Any]]]:
    """Record, plan and change one MoE layer after another.

    What a layer gives is kept for the next, in memory, so a model costs about two forward passes whatever its
    depth. Where that would not be the model's own forward (encoder-decoders, layers that share more than
    hidden states; found by trying) the text runs from the start for each layer: half of L + 1 passes for L.

    Args:
        model: Changed in place.
        layers: Its MoE layers, in the order of the forward.
        blocks: Calibration text.
        plan_layers: The planner, with its options; called with one layer at a time.
        batch_size: Blocks at a time.
        sample_inputs: Whether plan or alignment need samples.
        progress: Show a progress bar.
        processes: Of which each reads its share, and does the same to its own model. None is one.

    Returns:
        The plan of all layers, which `apply_plan` would carry out on the original; the statistics that it was
        made of; and what `apply_plan` reports.

    Raises:
        ValueError: As the planner does, and if the layers would not all be planned alike.
    """
    identity, plans, report = ModelIdentity.of(layers), [], {}
    processes = processes or Processes()
    own = [model_inputs(model, batch) for batch in processes.share(blocks, batch_size).batches(batch_size)]
    reader = layer_reader(model, own)
    statistics = RoutingStatistics(fingerprint={"data": blocks.fingerprint})
    for layer in tqdm(layers, desc="layer by layer", unit="layer", disable=not progress):
        samples = processes.empty_samples([layer], blocks, batch_size) if sample_inputs else None
        with evaluating(model), record_routing(model, [layer]) as seen:
            sampling = nullcontext() if samples is None else record_inputs(model, [layer], samples=samples)
            with sampling:
                reader.read(layer)
        known, samples = processes.joined(seen, samples)
        if not known.layers:
            raise ValueError(
                f"layer {layer.name!r} saw no token; with --sequential off such a layer stays as it is"
            )
        statistics.layers |= known.layers
        check_finite(layer)
        plans.append(plan_layers([layer], known, samples))
        report[layer.name] = apply_layer(
            layer, plans[-1].layers[0], plans[-1], known=known.layers[layer.name], samples=samples
        )
    plan = joined_plan(plans, identity, sequential=True)
    if plan.form == "stock":
        update_expert_count(model, plan.layers[0].num_experts, plan.layers[0].num_kept)
    return plan, statistics, report


def joined_plan(
    plans: list[CompressionPlan], identity: ModelIdentity, *, sequential: bool
) -> CompressionPlan:
    """One plan of the plans of single layers.

    Args:
        plans: Of the layers, in order.
        identity: Of the model before any of them was carried out.
        sequential: Whether each was made behind the layers before as they had become.
    """
    first = plans[0]
    protected = [expert for plan in plans for expert in plan.settings["protected"]]
    return CompressionPlan(
        model=identity,
        method=first.method,
        form=first.form,
        router=first.router,
        alignment=first.alignment,
        low_rank=first.low_rank,
        layers=tuple(plan.layers[0] for plan in plans),
        requested_experts=sum(plan.requested_experts for plan in plans),
        settings={**first.settings, "protected": protected, "sequential": sequential},
        notes=tuple(note for plan in plans for note in plan.notes),
    )


def check_sequential(grouping: str, exclude_layers: tuple[int, ...], layer_experts: tuple[int, ...]) -> None:
    """Refuse what needs to know all layers before the first is planned.

    Raises:
        ValueError: Another budget than uniform, or layers that stay as they are.
    """
    if grouping not in ("auto", "uniform") or exclude_layers or layer_experts:
        raise ValueError(
            "--sequential on and --stream plan a layer before the next is known, so all keep the same "
            "number: leave --grouping, --exclude-layers and --layer-experts out, or say --sequential off"
        )
