"""Rows as prompts, and the order in which they are taken."""

import pytest
from moekit.rl import make_prompts
from moekit.rl.prompts import draw_order

from .tiny_rl import tiny_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}{{ head }}{% endif %}"
)


def test_a_row_becomes_a_prompt_with_its_other_columns():
    row = {"prompt": "b c", "answer": 3, "completion": "not passed on"}
    (prompt,) = make_prompts([row], tiny_tokenizer())
    assert (prompt.index, prompt.text, prompt.ids, prompt.given) == (0, "b c", (4, 5), "b c")
    assert prompt.columns == {"answer": 3}
    assert not prompt.is_chat


def test_a_chat_goes_through_the_template_with_the_head_of_the_answer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    chat = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    (prompt,) = make_prompts([{"prompt": chat}], tokenizer, head="d")
    assert prompt.text == "b c d"
    assert prompt.ids == (4, 5, 6)
    assert prompt.given == chat
    assert prompt.is_chat


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a", "answer": "b"}, "row 2 has no 'prompt'; its columns: question, answer"),
        ({"prompt": None}, "row 2 has no 'prompt'"),
        ({"prompt": ""}, "prompt of row 2 is empty"),
        ({"prompt": "  "}, "prompt of row 2 is empty"),
        ({"prompt": "a b c d"}, "row 2 has 4 tokens, and at most 3"),
        ({"prompt": []}, "row 2 is neither a string nor a list of messages"),
        ({"prompt": 7}, "row 2 is neither"),
        ({"prompt": [{"role": "user"}]}, "row 2 is neither"),
        ({"prompt": [{"role": "user", "content": "a"}]}, "row 2 .* no chat template"),
    ],
)
def test_rows_that_are_no_prompts(row, message):
    with pytest.raises(ValueError, match=message):
        make_prompts([{"prompt": "a"}, row], tiny_tokenizer(), max_length=3)


def test_an_empty_text_is_empty_whatever_the_tokenizer_adds():
    with pytest.raises(ValueError, match="empty"):
        make_prompts([{"prompt": ""}], lambda text, add_special_tokens: {"input_ids": [0]})


def test_no_rows():
    with pytest.raises(ValueError, match="no rows"):
        make_prompts([], tiny_tokenizer())


def test_the_stream_is_the_same_however_it_is_read():
    whole = draw_order(5, 0, 23, seed=3)
    assert [draw_order(5, place, 1, seed=3)[0] for place in range(23)] == whole
    assert draw_order(5, 4, 9, seed=3) == whole[4:13]
    epochs = [whole[start : start + 5] for start in range(0, 20, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1
    assert draw_order(5, 0, 23, seed=4) != whole
