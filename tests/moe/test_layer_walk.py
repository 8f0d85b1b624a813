"""Decoder layers run one at a time, where that is the model's own forward; else refused before any of it."""

import dataclasses

import pytest
import torch
from moekit.moe.evaluating import evaluating
from moekit.moe.layer_walk import LayerWalk, NotStreamableError

from .families import FAMILIES
from .samples import fresh_case
from .tiny_models import Family, tiny_inputs

NO_WALK = {"diffusion_gemma", "ernie4_5_vl_moe", "switch_transformers"}
"""Families that have no list of decoder layers to walk."""
ENTANGLED = {"glm5_next", "glm_moe_dsa", "hy_v4", "mistral_large4", "zaya"}
"""Families whose layers pass on more than hidden states."""


def passes(walk: LayerWalk, inputs: dict[str, torch.Tensor]) -> bool:
    try:
        walk.check(inputs)
    except NotStreamableError:
        return False
    return True


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - NO_WALK))
def test_the_check_without_running_a_layer_is_right(family):
    model, inputs, _ = fresh_case(family)
    walk = LayerWalk(model)
    with evaluating(model):
        assert walk.is_faithful(inputs) == (family not in ENTANGLED)
        for layer in walk.layers:
            layer.to("meta")
        assert passes(walk, inputs) == (family not in ENTANGLED)
        assert passes(walk, {name: part[:1] for name, part in inputs.items()}) == (family not in ENTANGLED)


def test_layers_that_share_keys_and_values():
    row = FAMILIES["gemma4"]
    assert isinstance(row, Family)
    sharing = {"layer_types": ["full_attention"] * 3, "num_kv_shared_layers": 1}
    model = dataclasses.replace(row, overrides=row.overrides | sharing)()
    walk = LayerWalk(model)
    inputs = tiny_inputs(model)
    with evaluating(model):
        assert not walk.is_faithful(inputs)
    with pytest.raises(NotStreamableError, match="cannot be run one decoder layer at a time"):
        walk.check(inputs)


@pytest.mark.parametrize("family", sorted(ENTANGLED))
def test_nothing_raw_is_raised(family):
    model, inputs, _ = fresh_case(family)
    walk = LayerWalk(model)
    one = {name: part[:1] for name, part in inputs.items()}  # two might be taken apart as a pair
    with torch.no_grad():
        hidden = walk.step(0, [one], [])
        with pytest.raises(NotStreamableError, match="leave out --stream"):
            walk.step(1, [one], hidden)


def test_what_a_layer_raises_is_its_own():
    model, inputs, _ = fresh_case("qwen3_moe")
    walk = LayerWalk(model)

    def broken(*_, **__):
        raise ValueError("within the layer")

    walk.layers[1].forward = broken
    with torch.no_grad():
        hidden = walk.step(0, [inputs], [])
        with pytest.raises(ValueError, match="within the layer") as error:
            walk.step(1, [inputs], hidden)
    assert not isinstance(error.value, NotStreamableError)
