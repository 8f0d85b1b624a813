"""Activations of an expert's neurons; that they are the family's own is proved by the conformance suite."""

import pytest
import torch
from moekit.moe import expert_layers, neuron_activations
from moekit.moe.activations import expert_inputs
from torch import Tensor

from .families import tiny_inputs
from .samples import close, fresh, logits

FAMILIES = ["qwen3_moe", "gpt_oss", "switch_transformers", "nemotron_h", "dbrx", "jetmoe", "llama4"]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_column_for_each_neuron(family: str) -> None:
    for layer in expert_layers(fresh(family)):
        for expert in layer.experts()[:2]:
            inputs = torch.randn(5, layer.hidden_size)
            before = neuron_activations(layer, expert, inputs)
            order = torch.randperm(expert.width)
            for name, tensor in expert.named_tensors():
                if name not in ("down", "down_bias"):
                    tensor.copy_(tensor[order].clone())
            assert before.shape == (5, expert.width)
            torch.testing.assert_close(neuron_activations(layer, expert, inputs), before[:, order])


def test_values_by_hand_with_a_gate() -> None:
    layer = expert_layers(fresh("qwen3_moe"))[0]
    expert = layer.experts()[0]
    inputs = torch.randn(3, layer.hidden_size)
    gate, up = inputs @ expert.gate.T, inputs @ expert.up.T
    torch.testing.assert_close(neuron_activations(layer, expert, inputs), gate * gate.sigmoid() * up)


def test_bfloat16_stays_bfloat16() -> None:
    layer = expert_layers(fresh("gpt_oss").to(torch.bfloat16))[0]
    inputs = torch.randn(3, layer.hidden_size, dtype=torch.bfloat16)
    assert neuron_activations(layer, layer.experts()[0], inputs).dtype == torch.bfloat16


def test_llama4_experts_read_scaled_inputs() -> None:
    model = fresh("llama4")
    layer = expert_layers(model)[0]
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    read: list[Tensor] = []
    layer.experts_module.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with layer.observe(lambda *routed: seen.append(routed)):
        logits(model, tiny_inputs(model))
    hidden_TD, ids_T1, weights_T1 = seen[0]
    by_expert_ETD = read[0].view(layer.num_experts, len(hidden_TD), -1)
    chosen_TD = by_expert_ETD[ids_T1[:, 0], torch.arange(len(hidden_TD))]
    close(expert_inputs(layer, hidden_TD, weights_T1), chosen_TD)
    assert not torch.allclose(chosen_TD, hidden_TD)
