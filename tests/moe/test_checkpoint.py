"""The two forms on disk: exact, complete, usable by the libraries around them, and refused when damaged."""

# E logical experts, M physical experts

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from moekit.moe import MoETrainer, expert_layers, save_checkpoint, update_expert_count
from moekit.moe.checkpoint import mark_form, max_logit_difference
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel, TrainingArguments

from .families import tiny_inputs
from .samples import close, fresh, logits, merged
from .tiny_models import Family


def aligned(model: PreTrainedModel) -> PreTrainedModel:
    """A GEMM on memory-mapped tensors may round otherwise."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model.eval()


def reloaded(folder: Path, **options) -> PreTrainedModel:
    return aligned(AutoModelForCausalLM.from_pretrained(folder, **options))


def uneven(family: str = "qwen3_moe") -> PreTrainedModel:
    """Another number of experts and another router mode in each layer."""
    model = fresh(family)
    first, second, *others = expert_layers(model)
    first.replace_experts(first.experts()[:3], [0, 1, 2, 0, 1, 2, 0, 1])
    second.replace_experts(second.experts()[:5], [0, 1, 2, 3, 4, 4, 3, 2], router="logsumexp")
    for layer in others:
        layer.remove_experts(range(6))
    return model


def cut(family: str = "qwen3_moe") -> PreTrainedModel:
    """Another number of router rows in each layer."""
    model = fresh(family)
    for index, layer in enumerate(expert_layers(model)):
        layer.remove_experts(range(7 - index))
    return model


def test_all_router_modes_in_one_model(tmp_path: Path) -> None:
    model = uneven()
    inputs = tiny_inputs(model)
    assert save_checkpoint(model, tmp_path) == "moekit"
    again = reloaded(tmp_path)
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    assert max_logit_difference(model, again, inputs) == 0
    modes = [layer.router_mode for layer in expert_layers(again)]
    assert modes == ["redirect", "logsumexp", "full"]
    assert [layer.num_physical_experts for layer in expert_layers(again)] == [3, 5, 6]
    entries = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["layers"]
    assert [e["num_router_rows"] for e in entries.values()] == [8, 8, 6]
    assert again.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "gpt_oss", "deepseek_v4", "minimax_m2", "switch_transformers"]
)
def test_rows_cut_unevenly(family: str, tmp_path: Path) -> None:
    model = fresh(family)
    for index, layer in enumerate(expert_layers(model)):
        layer.remove_experts([7, 0, 3, 5, 1, 6, 2][: 7 - index])
    inputs = tiny_inputs(model)
    expected = logits(model, inputs)
    assert save_checkpoint(model, tmp_path) == "moekit"
    again = aligned(type(model).from_pretrained(tmp_path))
    assert torch.equal(logits(again, inputs), expected)
    for index, layer in enumerate(expert_layers(again)):
        assert (layer.num_experts, layer.num_physical_experts) == (7 - index, 7 - index)
        assert layer.router_mode == "full"


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "laguna"])
def test_the_load_balancing_loss_of_rows_cut_unevenly(family: str, tmp_path: Path) -> None:
    model = cut(family)
    inputs = tiny_inputs(model) | {"output_router_logits": True}
    save_checkpoint(model, tmp_path)
    with torch.no_grad():
        mine, theirs = model(**inputs), reloaded(tmp_path)(**inputs)
    assert torch.equal(mine.aux_loss, theirs.aux_loss)
    assert {rows.shape[-1] for rows in theirs.router_logits} == {8}
    # By hand: a removed expert has no probability, and each layer counts the same tokens.
    mask = tiny_inputs(model)["attention_mask"].flatten().bool()
    shares = torch.cat([rows[mask].softmax(-1) for rows in theirs.router_logits])
    chosen = torch.zeros_like(shares).scatter_(1, shares.topk(2, -1).indices, 1.0)
    expected = 8 * (chosen.mean(0) * shares.mean(0)).sum()
    assert float(mine.aux_loss) == pytest.approx(float(expected), rel=1e-5)
    last = expert_layers(model)[-1]
    assert shares[-12:, last.num_experts :].sum() == 0


def test_uniform_cuts_need_no_padding_of_logits(tmp_path: Path) -> None:
    model = fresh("qwen3_moe")
    for layer in expert_layers(model):
        layer.remove_experts(range(6))
    assert mark_form(model) == "moekit"
    update_expert_count(model, 8, 6)
    assert save_checkpoint(model, tmp_path) == "stock"
    inputs = tiny_inputs(model) | {"output_router_logits": True}
    with torch.no_grad():
        assert {rows.shape[-1] for rows in model(**inputs).router_logits} == {6}
        assert torch.equal(model(**inputs).aux_loss, reloaded(tmp_path)(**inputs).aux_loss)


def test_shards(tmp_path: Path) -> None:
    model = uneven()
    save_checkpoint(model, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert torch.equal(logits(reloaded(tmp_path), tiny_inputs(model)), logits(model, tiny_inputs(model)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = uneven().to(dtype)
    save_checkpoint(model, tmp_path)
    again = reloaded(tmp_path)
    assert {p.dtype for p in again.parameters()} == {dtype}
    before, after = model.state_dict(), again.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before | after)
    save_checkpoint(again, tmp_path / "twice")  # `to` rounds the rotary buffers, which loading does not
    assert torch.equal(
        logits(reloaded(tmp_path / "twice"), tiny_inputs(model)), logits(again, tiny_inputs(model))
    )
    wide = reloaded(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert all(
        layer.expert_map is None or layer.expert_map.dtype == torch.long for layer in expert_layers(wide)
    )


def test_tied_embeddings(tmp_path: Path) -> None:
    model = Family("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {"tie_word_embeddings": True})()
    for layer in expert_layers(model):
        layer.replace_experts(layer.experts()[:4], [0, 1, 2, 3] * 2)
    save_checkpoint(model, tmp_path)
    stored = [name for file in tmp_path.glob("*.safetensors") for name in load_file(file)]
    assert "lm_head.weight" not in stored
    again = reloaded(tmp_path)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert torch.equal(logits(again, tiny_inputs(model)), logits(model, tiny_inputs(model)))


def test_base_and_head_models_read_each_other(tmp_path: Path) -> None:
    model = uneven()
    inputs = tiny_inputs(model)
    save_checkpoint(model, tmp_path / "head")
    base = aligned(AutoModel.from_pretrained(tmp_path / "head"))
    with torch.no_grad():
        expected = model.model(**inputs).last_hidden_state
        assert torch.equal(base(**inputs).last_hidden_state, expected)
        assert save_checkpoint(base, tmp_path / "base") == "moekit"
        with_head = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        assert torch.equal(aligned(with_head).model(**inputs).last_hidden_state, expected)


def test_it_is_a_plain_model_after_loading(tmp_path: Path) -> None:
    model = uneven()
    save_checkpoint(model, tmp_path)
    again = reloaded(tmp_path)
    assert again.double().float().bfloat16().half().dtype == torch.float16
    assert not hasattr(again.config, "_is_quantized")
    assert all(p.requires_grad for p in again.parameters())


def test_saving_a_reloaded_model_plainly_keeps_the_form(tmp_path: Path) -> None:
    model = uneven()
    save_checkpoint(model, tmp_path / "a")
    reloaded(tmp_path / "a").save_pretrained(tmp_path / "b")
    again = reloaded(tmp_path / "b")
    assert torch.equal(logits(again, tiny_inputs(model)), logits(model, tiny_inputs(model)))


def test_a_model_made_whole_again_is_stock(tmp_path: Path) -> None:
    model, original = merged("qwen3_moe"), fresh("qwen3_moe")
    assert mark_form(model) == "moekit"
    for layer, other in zip(expert_layers(model), expert_layers(original), strict=True):
        layer.replace_experts(other.experts(), range(8))
    assert save_checkpoint(model, tmp_path) == "stock"
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "jetmoe"])
def test_generation_after_reloading(family: str, tmp_path: Path) -> None:
    model = merged(family, 3)
    save_checkpoint(model, tmp_path)
    prompt = {"input_ids": torch.tensor([[5, 9, 33]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    assert torch.equal(reloaded(tmp_path).generate(**prompt, **options), model.generate(**prompt, **options))


def trainer_for(model, folder: Path, steps: int) -> MoETrainer:
    ids_NS = torch.randint(3, 64, (24, 8), generator=torch.Generator().manual_seed(5))
    return MoETrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder), max_steps=steps, save_steps=2, per_device_train_batch_size=4, seed=3,
            learning_rate=0.01, lr_scheduler_type="constant", use_cpu=True, report_to=[], disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=[{"input_ids": ids_S, "labels": ids_S} for ids_S in ids_NS],
    )  # fmt: skip


def test_training_a_reloaded_model_and_resuming_it_bit_by_bit(tmp_path: Path) -> None:
    start = tmp_path / "start"
    save_checkpoint(uneven(), start)
    whole = trainer_for(reloaded(start), tmp_path / "run", 4)
    whole.train()
    expected = whole.model.state_dict()
    before = reloaded(start).state_dict()
    trained = [n for n in before if not torch.equal(before[n], expected[n])]
    assert any("experts" in n for n in trained)
    assert any("gate.weight" in n for n in trained)
    resumed = trainer_for(reloaded(start), tmp_path / "run", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    actual = resumed.model.state_dict()
    assert [n for n in expected if not torch.equal(actual[n], expected[n])] == []
    last = reloaded(tmp_path / "run" / "checkpoint-4").state_dict()
    assert [n for n in expected if not torch.equal(last[n], expected[n])] == []


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ],
    ids=["attention", "experts"],
)
def test_adapters_on_a_reloaded_model(targets: dict[str, list[str]], tmp_path: Path) -> None:
    model = merged("qwen3_moe", 3)
    save_checkpoint(model, tmp_path / "base")
    inputs = tiny_inputs(model)
    adapted = get_peft_model(reloaded(tmp_path / "base"), LoraConfig(r=2, lora_alpha=4, **targets))
    assert torch.equal(logits(adapted.eval(), inputs), logits(model, inputs))
    trainer_for(adapted, tmp_path / "run", 3).train()
    expected = logits(adapted.eval(), inputs)
    assert not torch.allclose(expected, logits(model, inputs), atol=1e-4)
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(reloaded(tmp_path / "base"), tmp_path / "adapter").eval()
    close(logits(again, inputs), expected, 1e-6)
    folded = again.merge_and_unload()
    close(logits(folded, inputs), expected)
    assert save_checkpoint(folded, tmp_path / "folded") == "moekit"
    close(logits(reloaded(tmp_path / "folded"), inputs), expected)


# --- what others read


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss", "gemma4", "glm4_moe"]
)
def test_the_config_reads_back_equal_and_spells_what_old_readers_want(family: str, tmp_path: Path) -> None:
    model = merged(family)
    save_checkpoint(model, tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["num_experts"] == saved["num_local_experts"] == saved["n_routed_experts"] == 8
    rope = saved["rope_parameters"]
    if "rope_theta" in rope:
        assert saved["rope_theta"] == rope["rope_theta"]
    if family == "gpt_oss":
        assert saved["rope_scaling"]["rope_type"] == "yarn"
    read = AutoConfig.from_pretrained(tmp_path).to_dict()
    written = model.config.to_dict()
    added = {"num_experts", "num_local_experts", "n_routed_experts", "rope_theta", "rope_scaling"}
    for key, value in written.items():
        if key not in ("quantization_config", "_name_or_path"):
            assert read[key] == value, key
    assert read.keys() - written.keys() <= added | {"quantization_config"}
    again = AutoConfig.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path / "again")
    assert AutoConfig.from_pretrained(tmp_path / "again").to_dict() | {"_name_or_path": str(tmp_path)} == read


LOAD_WITHOUT = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "moekit":
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocked())
import torch, transformers
from safetensors.torch import load_file, save_file
transformers.logging.set_verbosity_warning()
folder, name = sys.argv[1:3]
model = getattr(transformers, name).from_pretrained(folder).eval()
for tensor in (*model.parameters(), *model.buffers()):
    tensor.data = tensor.data.clone()
with torch.no_grad():
    logits = model(**load_file(folder + "/../inputs.safetensors")).logits
save_file({"logits": logits}, folder + "/../logits.safetensors")
"""


def load_without_moekit(model: PreTrainedModel, folder: Path) -> subprocess.CompletedProcess[str]:
    save_file(
        {n: t.contiguous() for n, t in tiny_inputs(model).items()}, folder.parent / "inputs.safetensors"
    )
    command = [sys.executable, "-c", LOAD_WITHOUT, str(folder), type(model).__name__]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_stock_form_needs_no_moekit(family: str, tmp_path: Path) -> None:
    model = merged(family, 5)
    for layer in expert_layers(model):
        layer.remove_experts([4, 0, 3, 2, 1])
    update_expert_count(model, 8, 5)
    assert save_checkpoint(model, tmp_path / "stock") == "stock"
    done = load_without_moekit(model, tmp_path / "stock")
    assert done.returncode == 0, done.stderr
    assert torch.equal(
        load_file(tmp_path / "logits.safetensors")["logits"], logits(model, tiny_inputs(model))
    )


@pytest.mark.parametrize("build", [merged, uneven, cut])
def test_without_moekit_the_moekit_form_does_not_load(build, tmp_path: Path) -> None:
    model = build("qwen3_moe")
    save_checkpoint(model, tmp_path / "moekit")
    done = load_without_moekit(model, tmp_path / "moekit")
    assert done.returncode != 0
    assert "Unknown quantization type, got moekit" in done.stderr
    assert "ignore_mismatched_sizes" in done.stderr
