"""Align the experts of a layer by what their neurons do on sampled tokens (activation matching)."""

# T tokens, D hidden (model) width

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from ..moe.activations import neuron_activations
from ..moe.layer import ExpertLayer
from ..moe.samples import InputSamples, LayerSample
from ..moe.weights import ExpertWeights
from .alignment import Alignment, activation_permutation, check_same_layout, neuron_cosines
from .layer_plan import LayerPlan


@torch.no_grad()
def match_activations(
    layer: ExpertLayer,
    expert: ExpertWeights,
    reference: ExpertWeights,
    inputs_TD: Float[Tensor, "T D"],
    *,
    with_weights: bool = False,
) -> Alignment:
    """Find the neuron order in which an expert's activations correlate best with a reference's.

    Both experts run on the same tokens; see ``activation_permutation`` for the matching. Beside that the
    cost is one F x T x F product, and one linear assignment, O(F^3), on the CPU.

    Args:
        layer: Where the experts are from; not changed.
        expert: The expert to reorder.
        reference: The expert whose order is kept; same layout.
        inputs_TD: What the layer's experts read for the tokens that either of the two served
            (``LayerSample.routed_to``). At most one token gives the identity, or what the weights say.
        with_weights: Add the cosines of the neurons' weights to the correlations of their activations.

    Returns:
        The alignment, for ``permute_expert``. Neurons that the tokens do not tell apart (silent ones, or
        those active on one and the same token) come in any order.

    Raises:
        ValueError: Different layouts, or NaN or infinity among the activations.

    Reference: Li et al., "Merge, Then Compress" (MC-SMoE, ICLR 2024), section 3.1, arXiv:2310.01334.

    *Departs from the paper*: gated experts, whose activation is ``act(gate x) * (up x)``, which the release
    does not cover.
    """
    check_same_layout(expert, reference, "the expert", "its reference")
    inputs_TD = inputs_TD.to(expert.up)
    reference_TF = neuron_activations(layer, reference, inputs_TD)
    hidden_TF = neuron_activations(layer, expert, inputs_TD)
    score_FF = neuron_cosines(reference, expert) if with_weights else None
    return Alignment(activation_permutation(reference_TF, hidden_TF, score_FF))


def check_samples(
    samples: InputSamples | None, layers: Mapping[str, ExpertLayer], plans: tuple[LayerPlan, ...]
) -> None:
    """Refuse samples that do not serve to merge what a plan merges.

    Args:
        samples: From ``record_inputs``.
        layers: The layers of the model by name.
        plans: What becomes of each layer; those where nothing is merged need no sample.

    Raises:
        ValueError: There are none, a layer is missing or does not fit; says how to get them.
    """
    if samples is None:
        raise ValueError(
            "alignment 'activations' needs samples of what the experts read: run calibration text inside "
            "`with record_inputs(model) as samples`, then apply_plan(model, plan, samples=samples); or use "
            "alignment 'weights'"
        )
    for plan in plans:
        if any(sum(weight > 0 for weight in group.weights) > 1 for group in plan.groups):
            _check_layer(samples.layers.get(plan.name), layers[plan.name])


def _check_layer(sample: LayerSample | None, layer: ExpertLayer) -> None:
    if sample is None:
        raise ValueError(
            f"the samples hold no token of layer {layer.name!r}, whose experts the plan merges: record text "
            "that reaches it, keep its experts apart, or use alignment 'weights'"
        )
    sizes = {
        "hidden width": (sample.inputs.shape[1], layer.hidden_size),
        "top_k": (sample.expert_ids.shape[1], layer.top_k),
    }
    for what, (got, wanted) in sizes.items():
        if got != wanted:
            raise ValueError(
                f"the samples are of another model: {what} {got} in layer {layer.name!r}, which has {wanted}"
            )
    if (sample.expert_ids >= layer.num_experts).any():
        raise ValueError(
            f"the samples are of another model: expert {int(sample.expert_ids.max())} in layer "
            f"{layer.name!r}, which has {layer.num_experts}"
        )
    if not sample.inputs.isfinite().all():
        raise ValueError(
            f"the sample of layer {layer.name!r} holds NaN or infinity; nothing was changed, check the model"
        )
