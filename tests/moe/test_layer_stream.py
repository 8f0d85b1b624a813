"""A streamed model says what the model says that is loaded whole, whatever its family."""

from pathlib import Path

import pytest
import torch
from moekit.moe.evaluating import evaluating
from moekit.moe.layer_stream import LayerStream
from moekit.moe.layer_walk import NotStreamableError
from transformers import PreTrainedModel

from .families import FAMILIES
from .samples import close, fresh_case
from .test_layer_walk import ENTANGLED, NO_WALK

OTHER_NAMES = {
    *("deepseek_ocr2", "inkling2", "nemotron_h", "qwen3_omni_moe", "step3p7", "unlimited_ocr"),
}
"""Families whose checkpoints call the list of layers otherwise."""


def streamed(model: PreTrainedModel, folder: Path) -> LayerStream:
    """The model without weights, and its files."""
    with torch.device("meta"):
        empty = type(model)._from_config(model.config, dtype=torch.float32).eval()
    files = sorted(folder.glob("*.safetensors"))
    return LayerStream(empty, files, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize("family", sorted(OTHER_NAMES))
def test_files_whose_layers_are_not_found(family, tmp_path):
    model, _, _ = fresh_case(family)
    model.save_pretrained(tmp_path)
    with pytest.raises(NotStreamableError, match="the checkpoint's files hold no"):
        streamed(model, tmp_path)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - NO_WALK - ENTANGLED - OTHER_NAMES))
def test_families(family, tmp_path):
    model, inputs, expected = fresh_case(family)
    model.save_pretrained(tmp_path)
    stream = streamed(model, tmp_path)
    hidden = []
    with evaluating(stream.model):
        stream.load_outside()
        for index in range(len(stream)):
            stream.load(index)
            hidden = stream.step(index, [inputs], hidden)
            stream.drop(index)
        close(stream.logits(inputs, hidden[0]), expected)
