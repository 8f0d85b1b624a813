import math

import pytest
import torch
from moekit.moe.dropout.balance import load_balance_loss


def loop_reference(logits, ids, counted):
    num_experts = logits.shape[1]
    rows = [row for row in range(len(logits)) if counted[row]]
    choices = [expert for row in rows for expert in ids[row].tolist()]
    total = 0.0
    for expert in range(num_experts):
        share = choices.count(expert) / len(choices)
        probabilities = [float(logits[row].softmax(-1)[expert]) for row in rows]
        total += share * sum(probabilities) / len(probabilities)
    return num_experts * total


@pytest.mark.parametrize("k", [1, 2, 4])
def test_it_is_what_a_loop_computes_and_padding_does_not_count(k):
    logits = torch.randn(20, 4, dtype=torch.float64)
    ids = logits.topk(k).indices
    counted = torch.rand(20) < 0.6
    computed = load_balance_loss(logits, ids, counted)
    assert float(computed) == pytest.approx(loop_reference(logits, ids, counted), rel=1e-12)
    torch.testing.assert_close(computed, load_balance_loss(logits[counted], ids[counted]))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_it_is_1_in_balance_and_e_when_one_expert_has_it_all(k):
    ids = torch.stack([(torch.arange(k) + token) % 4 for token in range(8)])
    assert float(load_balance_loss(torch.zeros(8, 4), ids)) == 1
    logits = torch.tensor([100.0, 0, 0, 0]).expand(8, 4)
    assert float(load_balance_loss(logits, torch.zeros(8, 1, dtype=torch.long))) == 4


def test_values_by_hand():
    logits = torch.tensor([[math.log(3), 0.0], [math.log(3), 0.0], [0.0, math.log(3)]])
    ids = torch.tensor([[0], [0], [1]])
    # shares 2/3 and 1/3, mean probabilities 7/12 and 5/12
    assert float(load_balance_loss(logits, ids)) == pytest.approx(2 * (2 / 3 * 7 / 12 + 1 / 3 * 5 / 12))


def test_the_gradient_takes_probability_from_the_busy_expert():
    logits = torch.zeros(4, 2, requires_grad=True)
    load_balance_loss(logits, torch.tensor([[0], [0], [0], [1]])).backward()
    assert logits.grad is not None
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 1] < 0).all()


def test_without_tokens_it_is_zero():
    loss = load_balance_loss(
        torch.randn(3, 4), torch.zeros(3, 1, dtype=torch.long), torch.zeros(3, dtype=torch.bool)
    )
    assert float(loss) == 0


def test_half_precision_is_summed_in_single():
    logits = torch.randn(1000, 8).bfloat16()
    loss = load_balance_loss(logits, logits.topk(2).indices)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, load_balance_loss(logits.float(), logits.topk(2).indices))
