"""Data that `moekit rl` refuses, with what to do, before it has read any weights."""

from importlib.util import find_spec

import pytest

from .tiny_checkpoints import tiny_tokenizer
from .tiny_rl_runs import TEMPLATE, write_json_lines, write_rewards


@pytest.mark.parametrize(
    ("rows", "options", "says"),
    [
        ([{"question": "1 + 1", "answer": "2"}], (), "row 1 has no 'prompt'; its columns: question, answer."),
        (
            [{"prompt": "1 + 1"}],
            (),
            "reward 'exact-match' asks for the columns ['answer'], which the data lack",
        ),
        ([{"prompt": "1"}, {"prompt": ""}], ("--reward", "format"), "the prompt of row 2 is empty"),
        (
            [{"prompt": 7, "answer": "7"}],
            (),
            "the prompt of row 1 is neither a string nor a list of messages",
        ),
        ([["1 + 1", "2"]], (), "is a list, not a table of columns"),
        ([{"prompt": [{"role": "user", "content": "1 + 1"}], "answer": "2"}], (), "has no chat template"),
        (
            [{"prompt": "1", "answer": "1", "prompts": 2}],
            (),
            "columns ['prompts'] have names that reward functions",
        ),
        (
            [{"prompt": "1", "answer": "1"}],
            ("--algorithm", "rl-plus"),
            "has demonstration=None; RL-PLUS needs a text",
        ),
        ([{"prompt": "1 2 3 " * 60, "answer": "1"}], (), "do not fit the policy's context of 128 tokens"),
        ([], (), "has no rows"),
    ],
)
def test_data_that_cannot_be(checkpoint, tmp_path, rl_refused, rows, options, says):
    rl_refused(checkpoint, write_json_lines(tmp_path / "rows.jsonl", rows), *options, says=says)


def test_a_reward_of_ones_own_asks_for_a_column(checkpoint, prompts, tmp_path, rl_refused):
    rewards = write_rewards(tmp_path)
    says = "reward 'wanting' asks for the columns ['difficulty'], which the data lack; they have: answer, "
    rl_refused(checkpoint, prompts, "--reward", f"{rewards}:wanting", says=says)


def test_a_reward_file_that_is_damaged(checkpoint, prompts, tmp_path, rl_refused):
    path = tmp_path / "rewards.py"
    path.write_text("def reward(:\n", encoding="utf-8")
    rl_refused(checkpoint, prompts, "--reward", f"{path}:reward", says="for a reward fails: SyntaxError")


@pytest.mark.parametrize(
    ("text", "name", "says"),
    [
        ('{"prompt": "1", "answer": "1"}\n{"prompt": "2", "ans', "rows.jsonl", "cannot be read: "),
        ("prompt,answer\n1 + 1,2\n1 + 2,3,4\n", "rows.csv", "row 2 of "),
        ("prompt: 1 + 1", "rows.yaml", "ends in '.yaml', not in one of .jsonl, .csv"),
    ],
)
def test_files_that_are_damaged(checkpoint, tmp_path, rl_refused, text, name, says):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    rl_refused(checkpoint, path, says=says)


def test_a_file_that_is_not_there(checkpoint, tmp_path, rl_refused):
    rl_refused(checkpoint, tmp_path / "rows.jsonl", says="rows.jsonl' does not exist")


def test_data_to_evaluate_on_that_cannot_be(checkpoint, prompts, tmp_path, rl_refused):
    rows = {"no prompt": {"answer": "2"}, "no answer": {"prompt": "1 + 1"}}
    says = {"no prompt": "row 1 has no 'prompt'", "no answer": "asks for the columns ['answer']"}
    for name, row in rows.items():
        held = write_json_lines(tmp_path / f"{name}.jsonl", [row])
        rl_refused(checkpoint, prompts, "--eval-data", held, says=says[name])


@pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed")
@pytest.mark.parametrize(
    ("task", "says"),
    [
        ("chain_sun", "reasoning-gym has no task 'chain_sun'; it has chain_sum"),
        ("", "reasoning-gym has no task ''; it has none of a similar name"),
        (
            "chain_sum:terms=2",
            "the task chain_sum has no setting 'terms'; its settings: min_terms, max_terms",
        ),
        ("chain_sum:min_terms", "'min_terms' is not KEY=VALUE"),
        ("chain_sum:min_terms=4,max_terms=2", "reasoning-gym cannot make the task of "),
        ("chain_sum:min_terms=two", "reasoning-gym cannot make the task of "),
        ("chain_sum:size=0", "size must be positive"),
    ],
)
def test_procedural_tasks_that_cannot_be(checkpoint, rl_refused, task, says):
    rl_refused(checkpoint, f"reasoning-gym:{task}", says=says)


def test_chats_need_messages(checkpoint, tmp_path, rl_refused):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for messages in ([], [{"role": "user"}], [{"role": "user", "content": 7}], ["1 + 1"]):
        data = write_json_lines(tmp_path / "chats.jsonl", [{"prompt": messages, "answer": "2"}])
        says = "the prompt of row 1 is neither a string nor a list of messages with role and content"
        rl_refused(checkpoint, data, "--tokenizer", tmp_path / "tokenizer", says=says)
        data.unlink()
