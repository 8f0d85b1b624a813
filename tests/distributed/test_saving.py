"""What sharded training asks of saving: write the tensors that were gathered, not those in the model."""

import pytest
import torch
from moekit.moe import to_smoe_dropout
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ..scripts.tiny_training import tiny_llama


@pytest.mark.parametrize("is_reloaded", [False, True])
def test_given_tensors_are_the_ones_that_are_saved(tmp_path, is_reloaded):
    model = to_smoe_dropout(tiny_llama(), 4)
    if is_reloaded:
        model.save_pretrained(tmp_path / "first")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    gathered = {name: torch.full_like(tensor, 2.0) for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "saved", state_dict=dict(gathered))
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == gathered.keys()
    assert all(bool((tensor == 2.0).all()) for tensor in saved.values())
