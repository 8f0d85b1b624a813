"""What `moekit rl` refuses, with what to do, before it has read any weights."""

import dataclasses
import json
import shutil
import typing
from pathlib import Path

import pytest
from moekit.rl import ALGORITHMS
from moekit.rl.rewards.names import REWARDS
from moekit.scripts import cli
from moekit.scripts import rl as command
from moekit.scripts.rl_checks import as_options
from moekit.scripts.rl_options import RlOptions
from moekit.scripts.rl_presets import TINY, USUAL, resolve
from transformers import (
    BertModel,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from .tiny_checkpoints import VOCABULARY, tiny_qwen, tiny_switch, tiny_tokenizer, write_checkpoint
from .tiny_rl_runs import rl, words
from .tiny_training import tiny_bert, tiny_llama, write_config

FIELDS = {field.name: field.type for field in dataclasses.fields(RlOptions)}
HINTS = {name: {hint, *typing.get_args(hint)} for name, hint in typing.get_type_hints(RlOptions).items()}
NUMBERS = [name for name, hints in HINTS.items() if {int, float} & hints and name != "reward_weights"]
MAY_BE_NEGATIVE = {"pass_at"}
"""Rewards may be, too."""


def test_choices_are_those_of_the_library():
    hints = typing.get_type_hints(RlOptions)
    assert set(typing.get_args(hints["algorithm"])) == set(ALGORITHMS)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_method_runs_with_what_it_needs(name):
    for preset in ("none", "tiny", "paper"):
        found = resolve(ALGORITHMS[name], preset, dict.fromkeys(USUAL))
        assert found.keys() == USUAL.keys()
        assert found["mini_batches"] * found["num_iterations"] >= ALGORITHMS[name].min_updates
        assert found["prompts_per_step"] % found["mini_batches"] == 0
        assert preset != "tiny" or found | TINY == found
    given = resolve(ALGORITHMS[name], "paper", dict.fromkeys(USUAL) | {"mini_batches": 3, "beta": 0.5})
    assert (given["mini_batches"], given["beta"]) == (3, 0.5)


def test_presets_are_those_of_the_papers():
    none = dict.fromkeys(USUAL)
    assert resolve(ALGORITHMS["kl-cov"], "paper", none)["mini_batches"] == 8
    assert resolve(ALGORITHMS["kl-cov"], "none", none)["mini_batches"] == 2
    assert resolve(ALGORITHMS["rl-plus"], "none", none)["entropy_coef"] == 0.001
    # Two passes are two updates already.
    assert resolve(ALGORITHMS["kl-cov"], "none", none | {"num_iterations": 2})["mini_batches"] == 1


def test_the_library_speaks_of_options_as_the_command_line_does():
    assert as_options("num_generations=1: raise mini_batches or beta=0.5") == (
        "--num-generations 1: raise --mini-batches or --beta 0.5"
    )
    assert (
        as_options("the steps of a seed, my_steps=2, resteps=3")
        == "the steps of a seed, my_steps=2, resteps=3"
    )


@pytest.mark.parametrize("value", ["-1", "nan", "inf"])
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_cannot_be(prompts, rl_refused, name, value):
    if value == "-1" and name in MAY_BE_NEGATIVE:
        return
    option = "--" + name.replace("_", "-")
    is_whole = int in HINTS[name]
    if is_whole and value != "-1":
        with pytest.raises(SystemExit):
            rl("policy", prompts, Path("out"), option, value)
        return
    more = ("--lora", 2) if name == "lora_alpha" else ()
    rl_refused("policy", prompts, *more, option, value, says=f"{option} {value}")


@pytest.mark.parametrize(
    "name",
    [
        "steps",
        "prompts_per_step",
        "num_generations",
        "mini_batches",
        "num_iterations",
        "micro_batch_size",
        "max_prompt_length",
        "max_completion_length",
        "eval_generations",
        "save_steps",
        "logging_steps",
        "lora",
    ],
)
def test_numbers_of_which_there_must_be_one(prompts, rl_refused, name):
    option = "--" + name.replace("_", "-")
    rl_refused("policy", prompts, option, 0, says=f"{option} 0 ")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ("--num-generations", 1),
            "--num-generations 1: GRPO compares the completions of a prompt and needs",
        ),
        (
            ("--algorithm", "kl-cov", "--mini-batches", 1),
            "KL-Cov does nothing of its own with 1 update of each",
        ),
        (
            ("--algorithm", "rloo", "--num-iterations", 2),
            "RLOO is right for at most 1 update of each rollout",
        ),
        (
            ("--prompts-per-step", 3, "--mini-batches", 2),
            "--prompts-per-step 3 cannot be divided among 1 process",
        ),
        (("--algorithm", "hbpo", "--num-generations", 3), "3 completions cannot be divided among 4 budgets"),
        (
            ("--set", "epsilonn=0.1"),
            "GRPO has no setting 'epsilonn'; its settings: delta, epsilon, epsilon_high,",
        ),
        (("--set", "epsilon"), "--set 'epsilon' is not NAME=VALUE"),
        (("--set", "epsilon=high"), "GRPO's setting epsilon='high' must be a finite number"),
        (("--set", "epsilon=NaN"), "GRPO's setting epsilon=nan must be a finite number"),
        (("--set", "scale-rewards=all"), "GRPO's setting scale_rewards='all' must be"),
        (("--reward", "exact"), "there is no reward 'exact'; there are: " + ", ".join(REWARDS)),
        (("--reward", "nowhere:reward"), "importing 'nowhere' for a reward fails: ModuleNotFoundError"),
        (("--reward", "nowhere.py:reward"), "reward file 'nowhere.py' does not exist"),
        (
            ("--reward", "json:dumps_"),
            "reward 'json:dumps_': json has no function 'dumps_'; it has: ",
        ),
        (("--reward", "number", "number"), "reward functions share the names ['number']"),
        (
            ("--reward", "number", "format", "--reward-weights", 1),
            "--reward-weights gives 1 weights for 2 rewards",
        ),
        (("--reward-weights", "nan"), "weight nan is not finite"),
        (("--reward-timeout", 0), "--reward-timeout 0.0 is not a positive number"),
        (("--top-p", 0), "--top-p 0.0 must be above 0 and at most 1"),
        (("--min-p", 2), "--min-p 2.0 must be between 0 (every token) and 1"),
        (("--temperature", 0), "--temperature 0.0 must be above 0"),
        (("--learning-rate", 0), "--learning-rate 0.0 must be above 0"),
        (("--stop", ""), "stop holds an empty text"),
        (("--rehearsal-threshold", 2), "--rehearsal-threshold 2.0 is a share and at most 1"),
        (("--lr-scheduler", "sinus"), "--lr-scheduler 'sinus' cannot be used ("),
        (("--lr-scheduler", "reduce_lr_on_plateau"), "take constant, constant_with_warmup, linear or cosine"),
        (("--lora-alpha", 4), "--lora-alpha and --lora-targets need --lora, the rank"),
        (("--lora-targets", "q_proj"), "--lora-alpha and --lora-targets need --lora, the rank"),
        (("--eval-data", "x.jsonl", "--eval-prompts", 0), "--eval-prompts 0 reads nothing of --eval-data"),
        (
            ("--report-to", "diary"),
            "--report-to diary is not installed or not known to accelerate; there are: ",
        ),
        (("--device", "nowhere"), "--device nowhere cannot be used: "),
        (("--device", "meta"), "--device meta cannot be: accelerate trains on "),
        (("--max-shard-size", "much"), "--max-shard-size 'much' is not a size such as 500MB or 5GB"),
        (
            ("--prompt-template", "{sum}"),
            "'{sum}' names the column 'sum', which row 1 has not; its columns: prompt,",
        ),
        (("--prompt-template", "{answer"), "--prompt-template '{answer' is no template: "),
        (("--prompt-template", "{left[0]}"), "--prompt-template '{left[0]}' is no template: "),
    ],
)
def test_options_that_cannot_be(checkpoint, prompts, rl_refused, options, says):
    rl_refused(checkpoint, prompts, *options, says=says)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ("--lora", 2, "--lora-targets", "nothing"),
            "--lora-targets nothing: Target modules {'nothing'} not found",
        ),
        (
            ("--lora", 2, "--lora-targets", "gate_proj", "up_proj", "down_proj"),
            "belong to experts or routers, which are no linear maps and get no adapters",
        ),
        (("--max-prompt-length", 2), "the prompt of row 1 has "),
        (
            ("--max-completion-length", 125),
            "and --max-completion-length 125 do not fit the policy's context of 128",
        ),
        (
            ("--algorithm", "hbpo", "--max-completion-length", 12),
            "and --max-completion-length 12 leaves none",
        ),
        (("--tokenizer", "/no/where"), "'/no/where'"),
    ],
)
def test_what_does_not_fit_the_policy(checkpoint, prompts, rl_refused, options, says):
    without = tuple({"--max-completion-length"} & {*options})
    rl_refused(checkpoint, prompts, *options, says=says, without=without)


@pytest.mark.parametrize("option", [("--router-replay",), ("--router-aux-loss-coef", 0.1)])
def test_what_is_for_policies_with_experts(dense, prompts, rl_refused, option):
    rl_refused(
        dense, prompts, *option, says=f"{option[0]} is for policies with experts, and '{dense}' has none"
    )


@pytest.mark.parametrize(
    ("name", "says"), [("--data", "name the prompts"), ("--out", "name the folder to make")]
)
def test_what_is_missing_is_named(checkpoint, prompts, tmp_path, capsys, name, says):
    given = words(checkpoint, prompts, tmp_path / "out")
    place = given.index(name)
    assert cli.main(given[:place] + given[place + 2 :]) == 2
    assert f"{name} is missing: {says}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_empty_name_is_not_the_folder_one_is_in(checkpoint, prompts, rl_refused):
    rl_refused("", prompts, says="MODEL is empty; name a ")
    rl_refused(checkpoint, " ", says="--data is empty; name a ")


def test_a_policy_has_weights(prompts, tmp_path, rl_refused):
    config = write_config(tmp_path / "config")
    for name in (config, config / "config.json"):
        rl_refused(name, prompts, says=f"'{name}' has no weights; a policy must be a trained language model")


def test_a_policy_is_there(prompts, tmp_path, rl_refused):
    rl_refused(tmp_path / "nowhere", prompts, says=f"{tmp_path / 'nowhere'}'")


def test_a_policy_is_whole(checkpoint, prompts, tmp_path, rl_refused):
    policy = shutil.copytree(checkpoint, tmp_path / "cut")
    file = policy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    rl_refused(policy, prompts, says="is truncated: it has ")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: LlamaForSequenceClassification(tiny_llama().config),
            "is a LlamaForSequenceClassification, which",
        ),
        (tiny_bert, "is a BertForMaskedLM, which does not continue text; name a causal language model"),
        (
            lambda: BertModel(tiny_bert().config),
            "is of model type 'bert', which does not continue text; name",
        ),
        (tiny_switch, "is an encoder-decoder (switch_transformers); name a causal language model"),
    ],
)
def test_a_policy_continues_text(prompts, tmp_path, rl_refused, make, says):
    rl_refused(write_checkpoint(tmp_path / "policy", make()), prompts, says=says)


def test_a_policy_has_a_token_that_ends(prompts, tmp_path, rl_refused):
    policy = tmp_path / "policy"
    tiny_qwen(eos_token_id=None).save_pretrained(policy)
    backend = tiny_tokenizer().backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>").save_pretrained(policy)
    rl_refused(policy, prompts, says="has an end token (eos_token) in the model's vocabulary of 300")
    rl_refused(policy, prompts, "--tokenizer", tmp_path / "policy", says="so completions could only run into")


def test_a_token_that_ends_may_stand_in_the_generation_config_alone(prompts, tmp_path, monkeypatch):
    """And a tokenizer need not have one for padding."""
    policy, out = tmp_path / "policy", tmp_path / "out"
    model = tiny_qwen(eos_token_id=None)
    model.generation_config.eos_token_id = [0]
    model.save_pretrained(policy)
    PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer).save_pretrained(policy)
    monkeypatch.setattr(command, "write_rl_records", lambda *_: None)
    assert (
        rl(policy, prompts, out, "--steps", 1, "--eval-prompts", 0, without=("--steps", "--eval-prompts"))
        == 0
    )
    assert json.loads((out / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"] == [0]


def test_a_tokenizer_of_more_tokens_than_the_policy_knows(prompts, tmp_path, rl_refused):
    policy = write_checkpoint(tmp_path / "policy", tiny_qwen(vocab_size=VOCABULARY - 250))
    rl_refused(
        policy, prompts, says="and the policy's vocabulary has 50 tokens; name the policy's own tokenizer"
    )


def test_help_has_every_option_and_its_values(capsys):
    with pytest.raises(SystemExit):
        cli.main(["rl", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name in FIELDS:
        assert name == "model" or f"--{name.replace('_', '-')}" in shown
    for words_of in (
        "--set NAME=VALUE",
        "--prompt-template TEXT",
        "--stop TEXT",
        "0 for a single greedy one",
    ):
        assert words_of in shown
