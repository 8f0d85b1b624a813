"""Log-probs from hidden states in chunks, against the formulas written out."""

import math

import pytest
import torch
from moekit.rl.token_logprobs import token_logprobs

NAMES = ("logprobs", "entropies", "mean_vocab_logprobs")


def everything(hidden, ids, head, **more):
    found = token_logprobs(hidden, ids, head, entropies="gradient", with_mean_vocab=True, **more)
    assert tuple(sorted(found)) == tuple(sorted(NAMES))
    return tuple(found[name] for name in NAMES)


def test_values_worked_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    logprobs, entropies, means = everything(logits, torch.tensor([1, 0]), lambda rows: rows, chunk_size=1)
    first = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    torch.testing.assert_close(logprobs, torch.tensor([math.log(0.75), math.log(0.5)]))
    torch.testing.assert_close(entropies, torch.tensor([first, math.log(2)]))
    torch.testing.assert_close(means, torch.tensor([(math.log(0.25) + math.log(0.75)) / 2, math.log(0.5)]))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 100])
def test_gradients(temperature, chunk_size):
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(7, (5,))

    def function(hidden, weight):
        options = {"temperature": temperature, "chunk_size": chunk_size}
        return everything(hidden, ids, lambda rows: rows @ weight.T, **options)

    assert torch.autograd.gradcheck(function, (hidden, weight))
    logprobs = (hidden @ weight.T / temperature).log_softmax(-1)
    found = function(hidden, weight)
    torch.testing.assert_close(found[0], logprobs[range(5), ids])
    torch.testing.assert_close(found[1], -(logprobs.exp() * logprobs).sum(-1))
    torch.testing.assert_close(found[2], logprobs.mean(-1))


def test_entropies_have_a_gradient_only_if_it_is_wanted():
    hidden = torch.randn(3, 4, requires_grad=True)
    ids = torch.tensor([0, 1, 2])
    for entropies, wanted in (("value", False), ("gradient", True)):
        found = token_logprobs(hidden, ids, lambda rows: rows, chunk_size=2, entropies=entropies)
        assert found["entropies"].requires_grad == wanted
        assert found["logprobs"].requires_grad
    assert set(token_logprobs(hidden, ids, lambda rows: rows, chunk_size=2, entropies="none")) == {"logprobs"}


@pytest.mark.parametrize(
    ("num_rows", "num_chunks", "calls"), [(5, None, 3), (5, 4, 4), (0, None, 1), (0, 2, 2)]
)
def test_the_head_is_called_as_often_as_wanted_also_with_no_rows(num_rows, num_chunks, calls):
    sizes = []
    head = torch.nn.Linear(4, 7)

    def noted(rows):
        sizes.append(len(rows))
        return head(rows)

    hidden, ids = torch.randn(num_rows, 4), torch.zeros(num_rows, dtype=torch.long)
    found = token_logprobs(hidden, ids, noted, chunk_size=2, num_chunks=num_chunks)["logprobs"]
    assert len(sizes) == calls
    assert sum(sizes) == num_rows == len(found)
    found.sum().backward()
    assert head.weight.grad is not None


def test_too_few_chunks_are_refused():
    with pytest.raises(ValueError, match="2 chunks of 2 do not hold 5 tokens"):
        token_logprobs(
            torch.randn(5, 4), torch.zeros(5, dtype=torch.long), lambda rows: rows, chunk_size=2, num_chunks=2
        )


def test_half_precision_logits_are_widened_first():
    hidden = torch.randn(6, 4)
    weight = torch.randn(500, 4)
    ids = torch.arange(6)
    wide = (hidden.bfloat16() @ weight.T.bfloat16()).float().log_softmax(-1)
    found = token_logprobs(hidden.bfloat16(), ids, lambda rows: rows @ weight.T.bfloat16(), chunk_size=6)
    torch.testing.assert_close(found["logprobs"], wide[range(6), ids])
    assert found["entropies"].dtype == torch.float32
