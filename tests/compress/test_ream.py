"""REAM: similarity of gated outputs, and centroids that absorb."""

import pytest
import torch
from moekit.compress.expert_outputs import cosines, gated_output_gram
from moekit.compress.ream import absorb, ream_similarity
from moekit.moe import expert_layers, record_inputs, record_routing

from ..moe.samples import fresh_case, logits


def test_the_most_salient_take_first_and_the_rest_stay_alone():
    similarity_EE = torch.zeros(7, 7)
    for expert, likeness in ((3, 0.9), (4, 0.8), (5, 0.7), (6, 0.6)):
        similarity_EE[0, expert] = likeness
        similarity_EE[1, expert] = 1.0
    saliency_E = torch.tensor([9.0, 8.0, 7.0, 0.1, 0.1, 0.1, 0.1])
    assert absorb(similarity_EE, saliency_E, [0, 1, 2], capacity=3).tolist() == [0, 1, 2, 0, 0, 0, 1]
    assert absorb(similarity_EE, saliency_E, [0, 1, 2], capacity=16).tolist() == [0, 1, 2, 0, 0, 0, 0]
    assert absorb(similarity_EE, saliency_E, [0, 1, 2], capacity=4, alone=[0]).tolist() == [
        0,
        1,
        2,
        1,
        1,
        1,
        1,
    ]
    with pytest.raises(ValueError, match="at most capacity=1 experts each cannot take 4"):
        absorb(similarity_EE, saliency_E, [0, 1, 2], capacity=1)


def test_the_gram_is_that_of_whole_outputs_in_any_chunks(monkeypatch):
    model, inputs, _ = fresh_case("qwen3_moe")
    layer = expert_layers(model)[0]
    with record_inputs(model) as samples:
        logits(model, inputs)
    inputs_TD = samples.layers[layer.name].inputs
    gates_TE = torch.rand(len(inputs_TD), layer.num_experts)
    rows = []
    with torch.no_grad():
        for expert in range(layer.num_experts):
            ids_T1 = torch.full((len(inputs_TD), 1), expert)
            rows.append(layer.run_experts(inputs_TD, ids_T1, gates_TE[:, expert, None]).flatten())
    outputs_EX = torch.stack(rows).double()
    monkeypatch.setattr("moekit.compress.expert_outputs.CHUNK_BYTES", 4 * 8 * layer.hidden_size * 3)
    found_EE = gated_output_gram(layer, inputs_TD, gates_TE)
    torch.testing.assert_close(found_EE, outputs_EX @ outputs_EX.T, rtol=1e-4, atol=1e-6)


def test_similarity_is_the_mean_of_two_cosines():
    model, inputs, _ = fresh_case("qwen3_moe")
    layer = expert_layers(model)[0]
    with record_routing(model) as table, record_inputs(model) as samples:
        logits(model, inputs)
    known, inputs_TD = table.layers[layer.name], samples.layers[layer.name].inputs
    found_EE = ream_similarity(layer, known, inputs_TD)
    with torch.no_grad():
        gates_TE = layer.route(inputs_TD).router_logits.softmax(-1)
    expected = (known.logit_cosine + cosines(gated_output_gram(layer, inputs_TD, gates_TE))) / 2
    torch.testing.assert_close(found_EE, expected)
    assert torch.allclose(found_EE.diagonal(), torch.ones(8, dtype=torch.float64))
