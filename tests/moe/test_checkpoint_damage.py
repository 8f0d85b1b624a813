"""Damaged and foreign moekit checkpoints are refused with the reason, never loaded half."""

import json
from pathlib import Path

import pytest
from moekit.moe import MoekitConfig, save_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from .samples import merged


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


ENTRY = {"num_experts": 4, "num_router_rows": 8, "router": "redirect"}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("four", "'four' is not an entry of num_experts, num_router_rows and router"),
        ({}, "None experts behind None router rows"),
        (ENTRY | {"num_experts": 0}, "0 experts behind 8 router rows; there must be 1 to 8 experts"),
        (ENTRY | {"num_experts": 9}, "9 experts behind 8 router rows"),
        (ENTRY | {"num_experts": True}, "True experts behind 8 router rows"),
        (ENTRY | {"router": "mean"}, "router='mean' is not full, redirect or logsumexp"),
        (ENTRY | {"router": "full"}, "router='full' needs one row for each of 4 experts, not 8"),
        (ENTRY | {"router": "logsumexp"}, "needs renormalises=true or false and a finite scale"),
        (ENTRY | {"router": "logsumexp", "renormalises": True, "scale": float("nan")}, "a finite scale"),
        (ENTRY | {"router": "logsumexp", "renormalises": True, "scale": "1"}, "not True and '1'"),
    ],
)
def test_entries_that_cannot_be_are_refused(entry, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        MoekitConfig(layers={"model.layers.1.mlp": entry})
    save_checkpoint(merged("qwen3_moe"), tmp_path)
    edit(tmp_path, lambda config: config["layers"].update({"model.layers.1.mlp": entry}))
    with pytest.raises(ValueError, match=f"layer 'model.layers.1.mlp': .*{message}"):
        load(tmp_path)


def edit(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=2), "is of moekit format 2; this moekit reads 1: update it"),
        (
            lambda c: c["layers"].update({"model.layers.9.mlp": ENTRY}),
            "names layer 'model.layers.9.mlp'; Qwen3",
        ),
        (
            lambda c: c["layers"]["model.layers.0.mlp"].update(num_router_rows=16),
            "layer 'model.layers.0.mlp' is built with 8 experts; its entry needs 16 rows",
        ),
    ],
)
def test_configs_of_another_model_or_time_are_refused(change, message: str, tmp_path: Path) -> None:
    save_checkpoint(merged("qwen3_moe"), tmp_path)
    edit(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def damage(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    tensors: dict[str, Tensor] = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


MAP = "model.layers.1.mlp.experts.expert_map"
GROUPS = "model.layers.2.mlp.gate.expert_group"


@pytest.mark.parametrize(
    ("router", "change", "message"),
    [
        ("redirect", lambda t: t.pop(MAP), "lacks 'expert_map' of layer 'model.layers.1.mlp'"),
        ("redirect", lambda t: t[MAP].fill_(7), r"maps the experts of layer 'model.layers.1.mlp' to \[7\]"),
        ("redirect", lambda t: t[MAP].sub_(1), r"to \[-1, 0, 1, 2\], not to each of 0\.\.3"),
        ("redirect", lambda t: t.pop("model.layers.0.mlp.gate.weight"), "lacks 'weight' of layer"),
        ("logsumexp", lambda t: t.pop(GROUPS), "lacks 'expert_group' of layer 'model.layers.2.mlp'"),
        ("logsumexp", lambda t: t[GROUPS].clamp_(max=1), r"to \[0, 1\], not to each of 0\.\.3"),
    ],
)
def test_damaged_files_are_refused(router: str, change, message: str, tmp_path: Path) -> None:
    save_checkpoint(merged("qwen3_moe", router=router), tmp_path)
    damage(tmp_path, change)
    with pytest.raises(ValueError, match=f"{message}.*it is damaged" if "lacks" in message else message):
        load(tmp_path)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "switch_transformers"])
def test_missing_experts_are_refused(family: str, tmp_path: Path) -> None:
    """Transformers itself would draw them at random and go on."""
    model = merged(family)
    save_checkpoint(model, tmp_path)

    def without_the_last_expert(tensors: dict[str, Tensor]) -> None:
        names = [n for n in tensors if "experts" in n and "expert_map" not in n]
        prefix = names[-1].rpartition(".experts.")[0]
        for name in [n for n in names if n.startswith(prefix)]:
            del tensors[name]

    damage(tmp_path, without_the_last_expert)
    with pytest.raises(ValueError, match=r"the checkpoint lacks '.*it is damaged"):
        type(model).from_pretrained(tmp_path)
