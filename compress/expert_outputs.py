"""What every expert of a layer would say to a sample of the layer's tokens, whoever they were routed to."""

# T tokens, t tokens of a chunk, E experts, D hidden width, F FFN width

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..moe.activations import neuron_activations
from ..moe.layer import ExpertLayer
from ..moe.samples import InputSamples
from ..moe.weights import ExpertWeights

CHUNK_BYTES = 64 * 2**20
"""Of the outputs of all experts that are held at a time."""


def sampled_inputs(layer: ExpertLayer, samples: InputSamples | None, method: str) -> Float[Tensor, "T D"]:
    """The sampled tokens of a layer, on its device.

    Raises:
        ValueError: There are none, or NaN or infinity among them; says how to get them.
    """
    if samples is None or layer.name not in samples.layers:
        raise ValueError(
            f"method {method!r} needs samples of what the experts of layer {layer.name!r} read: run "
            "calibration text inside `with record_inputs(model) as samples` and pass samples=samples"
        )
    inputs_TD = samples.layers[layer.name].inputs
    if not inputs_TD.isfinite().all():
        raise ValueError(f"the sample of layer {layer.name!r} holds NaN or infinity; check the model")
    if inputs_TD.shape[1] != layer.hidden_size:
        raise ValueError(
            f"the samples are of another model: width {inputs_TD.shape[1]} in layer {layer.name!r}, which "
            f"has {layer.hidden_size}"
        )
    return inputs_TD.to(layer.device)


@torch.no_grad()
def mean_outputs(layer: ExpertLayer, inputs_TD: Float[Tensor, "T D"]) -> Float[Tensor, "E D"]:
    """``mean_x f_e(x)`` over all tokens of the sample, ungated, for every expert; float64 on the CPU."""
    means = []
    for expert in layer.experts():
        hidden_TF = neuron_activations(layer, expert, inputs_TD.to(expert.up))
        # The down projection is linear, so the mean may go through it.
        mean_F = hidden_TF.double().mean(0).to(torch.promote_types(expert.down.dtype, torch.float32))
        means.append(nn.functional.linear(mean_F, expert.down.to(mean_F), _to(expert.down_bias, mean_F)))
    return torch.stack(means).double().cpu()


@torch.no_grad()
def gated_output_gram(
    layer: ExpertLayer, inputs_TD: Float[Tensor, "T D"], gates_TE: Float[Tensor, "T E"]
) -> Float[Tensor, "E E"]:
    """``sum_x <g_i(x) f_i(x), g_j(x) f_j(x)>`` of every two experts, in chunks of tokens; float64, CPU.

    Args:
        layer: Whose experts.
        inputs_TD: Sampled tokens.
        gates_TE: Weight of each expert for each token.
    """
    experts = layer.experts()
    gram_EE = torch.zeros(len(experts), len(experts), dtype=torch.float64)
    size = max(1, CHUNK_BYTES // (4 * len(experts) * layer.hidden_size))
    for rows_tD, gates_tE in zip(inputs_TD.split(size), gates_TE.split(size), strict=True):
        outputs_EX = _gated_outputs(layer, experts, rows_tD, gates_tE)
        gram_EE += (outputs_EX @ outputs_EX.T).double().cpu()
    return gram_EE


def _gated_outputs(
    layer: ExpertLayer, experts: Sequence[ExpertWeights], rows_tD: Tensor, gates_tE: Tensor
) -> Tensor:
    """A row for each expert: its outputs for all tokens, end to end."""
    found = []
    for number, expert in enumerate(experts):
        hidden_tF = neuron_activations(layer, expert, rows_tD.to(expert.up))
        outputs_tD = nn.functional.linear(hidden_tF, expert.down, expert.down_bias).float()
        found.append((outputs_tD * gates_tE[:, number, None].to(outputs_tD)).flatten())
    return torch.stack(found)


def cosines(gram_EE: Float[Tensor, "E E"]) -> Float[Tensor, "E E"]:
    """Of a Gram matrix; a vector of length 0 is similar to itself alone."""
    norms_E = gram_EE.diagonal().clamp(min=0).sqrt()
    smallest = torch.finfo(gram_EE.dtype).tiny
    return (gram_EE / (norms_E[:, None] * norms_E).clamp(min=smallest)).clamp(-1, 1).fill_diagonal_(1)


def _to(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(like)
