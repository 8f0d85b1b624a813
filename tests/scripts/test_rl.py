"""`moekit rl` end to end: what it leaves, what it learns, and that it says the truth about it."""

import json
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from moekit.moe import expert_layers
from moekit.rl import ALGORITHMS
from moekit.scripts import cli
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from .tiny_checkpoints import TEXT_OPTIONS, tiny_qwen, tiny_tokenizer, write_checkpoint
from .tiny_rl_runs import (
    TEMPLATE,
    changed,
    fresh,
    history,
    prompt_rows,
    record,
    rl,
    skip_pictures,
    weights,
    words,
    write_json_lines,
)

NEEDED: dict[str, tuple[object, ...]] = {
    "kl-cov": ("--set", "share=0.2"),
    "clip-cov": ("--set", "share=0.2"),
    "hbpo": ("--set", "budgets=[0.5,1]", "budget_prefix={budget}"),
}
"""Settings with which something happens on so few tokens."""
GYM = "reasoning-gym:chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=1,size=20"


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """But for `whole`."""
    skip_pictures(monkeypatch)


@pytest.fixture(scope="module")
def whole(checkpoint, prompts, vowels, tmp_path_factory) -> Path:
    """A full run, kept for all tests that look at one."""
    out = tmp_path_factory.mktemp("whole") / "better"
    assert rl(checkpoint, prompts, out, *vowels) == 0
    return out


@pytest.fixture(scope="module")
def compressed(checkpoint, data, tmp_path_factory) -> Path:
    """The policy with half its experts, in the moekit form."""
    out = tmp_path_factory.mktemp("compressed") / "half"
    given = ("--data", data, "--out", out, "--ratio", 0.5, "--form", "moekit", "--no-report")
    assert cli.main(["compress", str(checkpoint), *TEXT_OPTIONS, *map(str, given)]) == 0
    return out


def rewards_of(out: Path) -> list[float]:
    return [row["reward"] for row in history(out) if "reward" in row]


def test_a_run_leaves_everything_and_nothing_else(whole):
    assert {path.name for path in whole.iterdir()} == {
        "README.md",
        "config.json",
        "figures",
        "generation_config.json",
        "model.safetensors",
        "report.html",
        "run.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert [path.name for path in whole.parent.iterdir()] == ["better"]
    for path in (whole / "figures").iterdir():
        with Image.open(path) as picture:
            picture.verify()


def test_the_record_says_what_was_done(whole, checkpoint, prompts):
    found, training = record(whole), record(whole)["training"]
    expected = {"algorithm": "grpo", "paper": "2402.03300", "model_class": "Qwen3MoeForCausalLM", "steps": 3}
    expected |= {"updates": 3, "skipped_steps": 0, "processes": 1}
    assert expected.items() <= training.items()
    assert training["parameters"] == training["trained_parameters"] == tiny_qwen().num_parameters()
    assert training["settings"]["num_generations"] == 4
    assert training["method_settings"] == ALGORITHMS["grpo"].hyperparameters()
    assert found["config"]["model"] == str(checkpoint)
    assert found["data"]["source"] == str(prompts)
    assert found["data"]["examples"] == {"train": 22, "held_out": 2}
    assert found["metrics"]["reward_failures"] == {}


def test_it_is_evaluated_before_and_after(whole):
    evaluated = [row["step"] for row in history(whole) if "eval_pass@1" in row]
    assert evaluated == [0, 3]
    assert [row["step"] for row in history(whole)] == [0, 1, 2, 3]
    assert {"eval_pass@2", "eval_reward", "eval_distinct"} <= history(whole)[0].keys()
    assert history(whole)[-1]["eval_reward"] > history(whole)[0]["eval_reward"]


def test_the_weights_are_trained_ones_in_float32(whole, checkpoint):
    assert changed(checkpoint, whole)
    assert {tensor.dtype for tensor in weights(whole).values()} == {torch.float32}
    loaded: Any = AutoModelForCausalLM.from_pretrained(whole, output_loading_info=True)
    assert not any(loaded[1].values())
    assert json.loads((whole / "config.json").read_text(encoding="utf-8"))["use_cache"]
    assert AutoTokenizer.from_pretrained(whole).get_vocab() == tiny_tokenizer().get_vocab()


def test_the_model_card_says_how_to_load_it(whole, checkpoint):
    card = (whole / "README.md").read_text(encoding="utf-8")
    assert f"# {checkpoint.name}: fine-tuned with GRPO\n" in card
    assert "(arXiv:2402.03300) for 3 steps" in card
    before, after = (history(whole)[index]["eval_reward"] for index in (0, -1))
    assert f"| reward | {before:.3f} | {after:.3f} |" in card
    code = card.partition("```python\n")[2].partition("```")[0].replace("path/or/hub-id", str(whole))
    found: dict[str, object] = {}
    exec(code, found)
    assert type(found["model"]).__name__ == "Qwen3MoeForCausalLM"


def test_the_report_shows_the_run(whole):
    page = (whole / "report.html").read_text(encoding="utf-8")
    for words_of in ("trained for 3 steps", "Q: ", "grpo", "pass@2", "22 to train on, 2 held out"):
        assert words_of.lower() in page.lower()


def test_the_recorded_command_repeats_the_run_and_tells_of_it(whole, tmp_path, capsys):
    recorded = shlex.split(record(whole)["command"])[1:]
    recorded[recorded.index("--out") + 1] = str(tmp_path / "again")
    assert fresh(recorded) == 0
    assert changed(whole, tmp_path / "again") == []
    assert history(tmp_path / "again") == history(whole)
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith("step ")]
    assert [line.partition(":")[0] for line in lines] == [f"step {step} of 3" for step in range(4)]
    assert lines[0].startswith("step 0 of 3: held out: pass@1 ")
    assert "reward 0." in lines[1]
    assert "held out" not in lines[1]
    assert "; held out: pass@1 " in lines[3]
    assert "On 2 held-out prompts" in said.out
    assert f"model:  {tmp_path / 'again'}" in said.out


def test_a_compressed_policy_keeps_its_form(compressed, prompts, vowels, tmp_path):
    out = tmp_path / "out"
    assert rl(compressed, prompts, out, *vowels, "--router-replay") == 0
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert (
        config == json.loads((compressed / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    )
    assert weights(out).keys() == weights(compressed).keys()
    model = AutoModelForCausalLM.from_pretrained(out)
    assert sum(layer.num_physical_experts for layer in expert_layers(model)) == 8
    assert "import moekit.moe" in (out / "README.md").read_text(encoding="utf-8")


def test_recomputing_activations_changes_nothing(whole, checkpoint, prompts, vowels, tmp_path):
    out = tmp_path / "out"
    assert rl(checkpoint, prompts, out, *vowels, "--gradient-checkpointing") == 0
    assert changed(whole, out) == []
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["use_cache"]


def test_bfloat16(whole, checkpoint, prompts, vowels, tmp_path):
    out = tmp_path / "out"
    assert rl(checkpoint, prompts, out, *vowels, "--bf16") == 0
    assert changed(whole, out)
    assert {tensor.dtype for tensor in weights(out).values()} == {torch.float32}


def test_a_divergence_from_the_policy_as_it_was(checkpoint, prompts, vowels, tmp_path):
    out = tmp_path / "out"
    assert rl(checkpoint, prompts, out, *vowels, "--beta", 0.1) == 0
    divergences = [row["kl"] for row in history(out) if "kl" in row]
    assert divergences[0] == pytest.approx(0, abs=1e-6)
    assert divergences[-1] > 1e-4


def test_replayed_routing_and_balanced_experts(checkpoint, prompts, vowels, tmp_path):
    out = tmp_path / "out"
    given = ("--router-replay", "--router-aux-loss-coef", 0.1, "--num-iterations", 2)
    assert rl(checkpoint, prompts, out, *vowels, *given) == 0
    assert record(out)["training"]["updates"] == 6
    assert all(row["expert_load_max"] >= 1 for row in history(out) if "reward" in row)


def test_a_dense_policy(dense, prompts, vowels, tmp_path):
    out = tmp_path / "out"
    assert rl(dense, prompts, out, *vowels) == 0
    assert changed(dense, out)
    assert not any("expert" in name for row in history(out) for name in row)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_method(checkpoint, prompts, vowels, tmp_path, name):
    out = tmp_path / "out"
    given = ("--algorithm", name, "--pass-at", 0.01, *NEEDED.get(name, ()))
    assert rl(checkpoint, prompts, out, *vowels[:2], *given) == 0
    training = record(out)["training"]
    assert training["updates"] == 3 * ALGORITHMS[name].min_updates
    assert ALGORITHMS[name].paper in (out / "README.md").read_text(encoding="utf-8")
    assert "arXiv:Williams" not in (out / "README.md").read_text(encoding="utf-8")
    assert changed(checkpoint, out)


def test_chats_go_through_the_template(checkpoint, vowels, tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]}
        for row in prompt_rows()
    ]
    chats, tokenizer = write_json_lines(tmp_path / "chats.jsonl", rows), tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    out = tmp_path / "out"
    assert rl(checkpoint, chats, out, *vowels, "--tokenizer", tmp_path / "tokenizer") == 0
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE
    assert rewards_of(out)


def test_prompts_of_other_columns(whole, checkpoint, vowels, tmp_path):
    rows = [{"sum": row["prompt"][3:-3], "answer": row["answer"]} for row in prompt_rows()]
    path, out = tmp_path / "rows.csv", tmp_path / "out"
    lines = ["sum,answer", *(f"{row['sum']},{row['answer']}" for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert rl(checkpoint, path, out, *vowels, "--prompt-template", "Q: {sum}\\nA:") == 0
    assert changed(whole, out) == []


def test_data_to_evaluate_on(checkpoint, prompts, vowels, tmp_path, capsys):
    held, out = write_json_lines(tmp_path / "held.jsonl", prompt_rows(9)), tmp_path / "out"
    given = ("--eval-data", held, "--eval-prompts", 5, "--eval-temperature", 0, "--eval-steps", 2)
    assert rl(checkpoint, prompts, out, *vowels, *given, without=("--eval-prompts",)) == 0
    assert record(out)["data"]["examples"] == {"train": 24, "held_out": 5}
    evaluated = [row for row in history(out) if "eval_pass@1" in row]
    assert [row["step"] for row in evaluated] == [0, 2, 3]
    assert "eval_pass@2" not in evaluated[0]  # one greedy completion of each
    assert "On 5 held-out prompts" in capsys.readouterr().out


def test_no_evaluation(checkpoint, prompts, vowels, tmp_path, capsys):
    out = tmp_path / "out"
    assert rl(checkpoint, prompts, out, *vowels, "--eval-prompts", 0, without=("--eval-prompts",)) == 0
    assert record(out)["data"]["examples"] == {"train": 24, "held_out": 0}
    assert [row["step"] for row in history(out)] == [1, 2, 3]
    assert "No prompts were held out." in (out / "README.md").read_text(encoding="utf-8")
    said = capsys.readouterr()
    assert "On training prompts" in said.out
    assert "nothing is evaluated" not in said.err


def test_too_few_prompts_to_hold_some_out(checkpoint, vowels, tmp_path, capsys):
    path = write_json_lines(tmp_path / "few.jsonl", prompt_rows(3))
    assert rl(checkpoint, path, tmp_path / "out", *vowels) == 0
    assert "warning: none of 3 prompts is held out, which takes 10" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard(checkpoint, prompts, vowels, tmp_path):
    out = tmp_path / "out"
    assert rl(checkpoint, prompts, out, *vowels, "--report-to", "tensorboard") == 0
    assert list((out / "trackers").rglob("events*"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed")
def test_procedural_tasks(checkpoint, tmp_path, capsys):
    out, again = tmp_path / "out", tmp_path / "again"
    given = (
        "--reward",
        "number",
        "soft-overlong",
        "--prompt-template",
        "Q: {question}\\nA:",
        "--stop",
        "\\n",
    )
    assert rl(checkpoint, GYM, out, *given, "--eval-data", GYM) == 0
    assert record(out)["data"]["examples"] == {"train": 20, "held_out": 2}
    assert rl(checkpoint, GYM, again, *given, "--seed", 1) == 0
    assert record(again)["data"]["examples"] == {"train": 18, "held_out": 2}
    assert record(out)["data"]["fingerprint"] != record(again)["data"]["fingerprint"]


def test_a_reward_of_a_module(checkpoint, prompts, reward_file, whole, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(reward_file.parent)
    out = tmp_path / "out"
    assert rl(checkpoint, prompts, out, "--reward", f"{reward_file.stem}:vowels", "--pass-at", 0.1) == 0
    assert changed(whole, out) == []
    del sys.modules[reward_file.stem]


def test_rewards_are_weighed(checkpoint, prompts, reward_file, whole, tmp_path):
    both = ("--reward", f"{reward_file}:vowels", f"{reward_file}:short", "--pass-at", 0.1)
    out, watched = tmp_path / "out", tmp_path / "watched"
    assert rl(checkpoint, prompts, out, *both, "--reward-weights", 2, 0.5) == 0
    row = history(out)[1]
    expected = 2 * row["rewards/vowels/mean"] + 0.5 * row["rewards/short/mean"]
    assert row["reward"] == pytest.approx(expected, rel=1e-5)
    assert rl(checkpoint, prompts, watched, *both, "--reward-weights", 1, 0) == 0
    assert changed(whole, watched) == []


@pytest.mark.parametrize(
    ("name", "kind", "count"), [("fails", "raised", None), ("unknown", "not finite", 2 * 2 + 3 * 4)]
)
def test_rewards_that_fail_are_counted_and_told(
    checkpoint, prompts, reward_file, tmp_path, name, kind, count, capsys
):
    """In both evaluations and in all steps."""
    out = tmp_path / "out"
    assert rl(checkpoint, prompts, out, "--reward", f"{reward_file}:{name}") == 0
    found = record(out)
    failed = found["metrics"]["reward_failures"][f"{name}/{kind}"]
    assert failed >= history(out)[-1]["reward_failures"] > 0
    assert count in (None, failed)
    warning = f"rewards failed and cost their completions ({name}/{kind}: {failed})"
    assert warning in found["warnings"]
    assert f"- {warning}" in (out / "README.md").read_text(encoding="utf-8")
    assert f"warning: {warning}" in capsys.readouterr().err


def test_nothing_learned_is_told(checkpoint, prompts, tmp_path, capsys):
    """A policy that knows no sums earns 0 with each completion."""
    out = tmp_path / "out"
    assert rl(checkpoint, prompts, out) == 0
    assert changed(checkpoint, out) == []
    assert record(out)["training"]["skipped_steps"] == 3
    assert "warning: 3 of 3 steps changed nothing" in capsys.readouterr().err


def test_the_tiny_preset_and_what_is_said_beside_it(checkpoint, prompts, vowels, tmp_path):
    out = tmp_path / "out"
    given = ("--preset", "tiny", "--steps", 1)
    without = ("--steps", "--learning-rate", "--prompts-per-step")
    assert rl(checkpoint, prompts, out, *vowels, *given, without=without) == 0
    settings = record(out)["training"]["settings"]
    assert (settings["learning_rate"], settings["prompts_per_step"]) == (3e-4, 16)
    assert (settings["num_generations"], settings["max_completion_length"]) == (4, 5)


def test_an_error_in_the_midst_leaves_nothing(checkpoint, prompts, reward_file, tmp_path, capsys):
    out = tmp_path / "out"
    assert fresh(words(checkpoint, prompts, out, "--reward", f"{reward_file}:too_few")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "reward 'too_few' returned 1 values for " in error
    assert list(tmp_path.iterdir()) == []


def test_a_sharded_result(checkpoint, prompts, vowels, tmp_path):
    out = tmp_path / "out"
    assert (
        rl(checkpoint, prompts, out, *vowels, "--steps", 1, "--max-shard-size", "40KB", without=("--steps",))
        == 0
    )
    assert (out / "model.safetensors.index.json").is_file()
    AutoModelForCausalLM.from_pretrained(out)


def test_a_licence_goes_with_the_weights(prompts, vowels, tmp_path):
    policy = write_checkpoint(tmp_path / "policy")
    (policy / "LICENSE").write_text("Do what you like.", encoding="utf-8")
    assert rl(policy, prompts, tmp_path / "out", *vowels, "--steps", 1, without=("--steps",)) == 0
    assert (tmp_path / "out" / "LICENSE").read_text(encoding="utf-8") == "Do what you like."
