"""What happens inside an expert: what it reads, and what its neurons say, in any family."""

# T tokens, D hidden (model) width, F FFN width, K active experts

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .families import Llama4Layer, SwitchLayer
from .layer import ExpertLayer
from .weights import ExpertWeights


def neuron_activations(
    layer: ExpertLayer, expert: ExpertWeights, inputs_TD: Float[Tensor, "T D"]
) -> Float[Tensor, "T F"]:
    """Compute the input of an expert's down projection, by the family's own activation.

    Args:
        layer: The layer that the expert belongs to; only its activation function is used.
        expert: The expert's weights, which need not be those in the layer.
        inputs_TD: What the expert reads (see ``expert_inputs``), on the weights' device, in their dtype.

    Returns:
        One column for each neuron; permuting the neurons permutes the columns.
    """
    module = layer.experts_module
    up_TF = nn.functional.linear(inputs_TD, expert.up, expert.up_bias)
    if expert.gate is None:
        return _activation(layer)(up_TF)
    gate_TF = nn.functional.linear(inputs_TD, expert.gate, expert.gate_bias)
    for owner in (module, layer.block):
        if hasattr(owner, "_apply_gate"):
            if getattr(module, "is_concatenated", True):
                return owner._apply_gate(torch.cat([gate_TF, up_TF], -1))
            return owner._apply_gate(torch.stack([gate_TF, up_TF], -1).flatten(-2))
    return _activation(layer)(gate_TF) * up_TF


def expert_inputs(
    layer: ExpertLayer, hidden_TD: Float[Tensor, "T D"], weights_TK: Float[Tensor, "T K"]
) -> Float[Tensor, "T D"]:
    """Turn what a layer's experts are called with into what a chosen expert reads.

    Args:
        layer: The layer.
        hidden_TD: Hidden states, as ``ExpertLayer.observe`` shows them.
        weights_TK: Routing weights of the choices.

    Returns:
        The hidden states themselves; in Llama-4, which scales the input of an expert, times the weight of the
        first choice (moekit merges Llama-4 under top-1 only).
    """
    return hidden_TD * weights_TK[:, :1] if isinstance(layer, Llama4Layer) else hidden_TD


def _activation(layer: ExpertLayer) -> Callable[[Tensor], Tensor]:
    """The function itself, wherever a family keeps it."""
    module = layer.experts_module
    if isinstance(layer, SwitchLayer):
        return module["expert_0"].act
    if hasattr(module, "act_fn"):
        return module.act_fn
    if hasattr(layer.block, "activation"):
        return layer.block.activation  # JetMoE
    return module.mlp.activation_fn  # DBRX
