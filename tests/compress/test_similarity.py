"""Similarity of experts: known angles, a slow reference, and experts that were never used."""

import pytest
import torch
from moekit.compress import similarity
from moekit.compress.similarity import (
    SIMILARITIES,
    output_similarity,
    router_logit_similarity,
    weight_similarity,
)
from moekit.moe.weights import ExpertWeights


def gated_experts(num_experts, dtype=torch.float32):
    shapes = {
        "up": (5, 4),
        "down": (4, 5),
        "gate": (5, 4),
        "up_bias": (5,),
        "gate_bias": (5,),
        "down_bias": (4,),
    }
    return [
        ExpertWeights(**{name: torch.randn(shape).to(dtype) for name, shape in shapes.items()})
        for _ in range(num_experts)
    ]


def flat(expert):
    return torch.cat([tensor.flatten().double() for _, tensor in expert.named_tensors()])


def test_router_logits_at_known_angles():
    logits_TE = torch.tensor([[1.0, 2.0, -1.0, 0.0], [0.0, 0.0, 0.0, 3.0]], dtype=torch.float64)
    expected = torch.tensor(
        [[1.0, 1.0, 0.0, 0.5], [1.0, 1.0, 0.0, 0.5], [0.0, 0.0, 1.0, 0.5], [0.5, 0.5, 0.5, 1.0]],
        dtype=torch.float64,
    )
    torch.testing.assert_close(router_logit_similarity(logits_TE.T @ logits_TE), expected)


def test_router_logits_equal_the_cosine_over_all_tokens():
    logits_TE = torch.randn(200, 6, dtype=torch.float64)
    cosine_EE = torch.cosine_similarity(logits_TE.T[:, None], logits_TE.T[None], dim=-1)
    got_EE = router_logit_similarity(logits_TE.T @ logits_TE)
    torch.testing.assert_close(got_EE, (cosine_EE + 1) / 2)
    assert torch.equal(got_EE, got_EE.T)


def test_router_logits_do_not_depend_on_how_the_tokens_are_split():
    logits_TE = torch.randn(90, 5, dtype=torch.float64)
    gram_EE = sum(part.T @ part for part in logits_TE.split(7))
    torch.testing.assert_close(
        router_logit_similarity(gram_EE), router_logit_similarity(logits_TE.T @ logits_TE)
    )


def test_an_expert_without_logits_is_neutral():
    similarity_EE = router_logit_similarity(torch.tensor([[0.0, 0.0], [0.0, 4.0]]))
    assert similarity_EE.tolist() == [[1.0, 0.5], [0.5, 1.0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_broken_gram_matrix_is_refused(bad):
    gram_EE = torch.eye(3)
    gram_EE[1, 1] = bad
    with pytest.raises(ValueError, match="NaN, infinity or a negative"):
        router_logit_similarity(gram_EE)


@pytest.mark.parametrize("chunk_elements", [1, 60, 1 << 22])
def test_weights_equal_the_cosine_of_flattened_experts(monkeypatch, chunk_elements):
    monkeypatch.setattr(similarity, "CHUNK_ELEMENTS", chunk_elements)
    experts = gated_experts(4)
    vectors_EX = torch.stack([flat(expert) for expert in experts])
    expected_EE = torch.cosine_similarity(vectors_EX[:, None], vectors_EX[None], dim=-1)
    torch.testing.assert_close(weight_similarity(experts), expected_EE, atol=1e-6, rtol=0)


def test_weights_in_bfloat16_are_compared_in_float32():
    experts = gated_experts(3, torch.bfloat16)
    widened = [ExpertWeights(**{n: t.float() for n, t in expert.named_tensors()}) for expert in experts]
    torch.testing.assert_close(weight_similarity(experts), weight_similarity(widened), atol=1e-7, rtol=0)


def test_weights_of_parameters_need_no_gradient():
    expert = ExpertWeights(up=torch.nn.Parameter(torch.ones(2, 2)), down=torch.nn.Parameter(torch.ones(2, 2)))
    assert not weight_similarity([expert, expert]).requires_grad


def test_weights_of_different_layouts_are_refused():
    gated = gated_experts(1)[0]
    plain = ExpertWeights(up=gated.up, down=gated.down)
    with pytest.raises(ValueError, match="expert 1 and expert 0 have different layouts"):
        weight_similarity([gated, plain])
    with pytest.raises(ValueError, match="at least one"):
        weight_similarity([])


def test_nan_weights_are_refused():
    experts = gated_experts(2)
    experts[1].up[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        weight_similarity(experts)


def test_outputs_compare_means_whatever_the_counts():
    means_ED = torch.randn(4, 6, dtype=torch.float64)
    counts_E = torch.tensor([1, 10, 100, 1000])
    expected_EE = torch.cosine_similarity(means_ED[:, None], means_ED[None], dim=-1)
    torch.testing.assert_close(output_similarity(means_ED * counts_E[:, None], counts_E), expected_EE)


def test_outputs_of_experts_without_tokens_resemble_only_themselves():
    sums_ED = torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    similarity_EE = output_similarity(sums_ED, torch.tensor([3, 4, 0]))
    assert similarity_EE.tolist() == [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]


def test_the_table_holds_every_measure():
    assert {
        "router-logits": router_logit_similarity,
        "weights": weight_similarity,
        "outputs": output_similarity,
    } == SIMILARITIES
