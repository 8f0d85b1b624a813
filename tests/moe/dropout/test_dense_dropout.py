import copy

import pytest
import torch
from moekit.moe.dropout.dense_dropout import add_ffn_dropout

from .small_models import gpt2, llama, token_ids


def hidden_of(model, path):
    seen = []
    module = model.get_submodule(path)
    handle = module.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model(input_ids=token_ids())
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(
    ("dense", "path"), [(llama, "model.layers.0.mlp.down_proj"), (gpt2, "transformer.h.0.mlp.c_proj")]
)
def test_hidden_activations_are_dropped_in_training_only(dense, path):
    model = dense().eval()
    ids = token_ids()
    expected, hidden = model(input_ids=ids).logits, hidden_of(model, path)
    handles = add_ffn_dropout(model, 0.25)
    assert len(handles) == 2
    assert torch.equal(model(input_ids=ids).logits, expected)
    dropped = hidden_of(model.train(), path)
    gone = dropped == 0
    assert 0.2 < gone.float().mean() < 0.3
    torch.testing.assert_close(dropped[~gone], hidden[~gone] / 0.75)


def test_handles_end_it_and_copies_have_it():
    model = llama().train()
    ids = token_ids()
    expected = model(input_ids=ids).logits
    handles = add_ffn_dropout(model, 0.5)
    twin = copy.deepcopy(model)
    for handle in handles:
        handle.remove()
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert not torch.equal(twin(input_ids=ids).logits, expected)


def test_the_state_is_that_of_the_dense_model():
    model = llama()
    names = list(model.state_dict())
    add_ffn_dropout(model, 0.5)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_what_is_no_probability_is_refused(p):
    with pytest.raises(ValueError, match="is not a probability of at least 0 and less than 1"):
        add_ffn_dropout(llama(), p)
