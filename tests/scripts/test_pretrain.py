"""The recipe of the bundled model: shares, packing, and a run from text to a checkpoint."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from moekit.moe import expert_layers
from moekit.scripts.pretrain import (
    END_ID,
    Example,
    PretrainConfig,
    domain_shares,
    main,
    pack,
    tokenise,
    train_tokenizer,
)
from moekit.scripts.sample import SampleConfig
from moekit.scripts.sample import main as sample
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_shares_that_are_not_named_follow_the_sizes() -> None:
    shares = domain_shares({"a": 10, "b": 30, "c": 60}, {"c": 0.2})
    assert shares == pytest.approx({"a": 0.2, "b": 0.6, "c": 0.2})


@pytest.mark.parametrize("asked", [{"d": 0.1}, {"a": 0.7, "b": 0.7}])
def test_shares_that_cannot_be_are_refused(asked: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="the data has the domains"):
        domain_shares({"a": 1, "b": 1}, asked)


EXAMPLES = {
    "a": [Example([10] * 5, prompt_length=2), Example([11] * 7)],
    "b": [Example([20] * 3), Example([21] * 9, prompt_length=9)],
}


def test_packing_keeps_the_shares_and_ends_every_document() -> None:
    stream, labels = pack(EXAMPLES, {"a": 0.75, "b": 0.25}, length=4000, seed=0)
    counts = Counter(stream.tolist())
    of_a = counts[10] + counts[11] + counts[10] // 5 + counts[11] // 7
    assert of_a / 4000 == pytest.approx(0.75, abs=0.01)
    documents = " ".join(map(str, stream.tolist())).split(f" {END_ID} ")
    assert set(documents[:-1]) == {" ".join([str(i)] * n) for i, n in ((10, 5), (11, 7), (20, 3), (21, 9))}
    learned = Counter(labels.tolist())
    assert learned[11] == counts[11]
    assert learned[10] == pytest.approx(counts[10] * 3 / 5, abs=3)
    assert learned[21] == 0
    assert bool(((labels == stream) | (labels == -100)).all())
    assert torch.equal(stream, pack(EXAMPLES, {"a": 0.75, "b": 0.25}, length=4000, seed=0)[0])
    assert not torch.equal(stream, pack(EXAMPLES, {"a": 0.75, "b": 0.25}, length=4000, seed=1)[0])


def test_a_prompt_ends_where_the_marker_ends() -> None:
    texts = ["Q: 1 + 2 =\nA: 3\n", "no question"]
    tokenizer = train_tokenizer({"text": texts * 20}, 280)
    with_answer, without = tokenise(texts, tokenizer, "\nA:")
    assert tokenizer.decode(with_answer.ids[: with_answer.prompt_length]) == "Q: 1 + 2 =\nA:"
    assert tokenizer.decode(with_answer.ids[with_answer.prompt_length :]) == " 3\n"
    assert without.prompt_length == 0
    assert tokenise(texts, tokenizer, None)[0].prompt_length == 0


@pytest.mark.slow
def test_recipe_runs_on_any_text(tmp_path: Path) -> None:
    rows = [
        {"domain": d, "text": f"Q: {d} {i} + {i}\nA: {2 * i}\n" * 5}
        for i in range(60)
        for d in ("sum", "add")
    ]
    data = tmp_path / "text.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    small = {"vocab_size": 300, "hidden_size": 32, "num_layers": 1, "num_experts": 4, "expert_width": 16}
    config = PretrainConfig(data=str(data), out=tmp_path / "out", steps=3, batch_size=2, seq_len=32, **small)
    main(config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert expert_layers(model)[0].num_experts == 4
    assert tokenizer.decode(tokenizer("Q: sum 12 + 12")["input_ids"]) == "Q: sum 12 + 12"
    assert len(tokenizer("12345")["input_ids"]) == 5
    more = PretrainConfig(
        data=str(data),
        out=tmp_path / "more",
        init=config.out,
        answer_marker="\nA:",
        steps=2,
        batch_size=2,
        seq_len=32,
    )
    main(more)
    assert expert_layers(AutoModelForCausalLM.from_pretrained(more.out))[0].num_experts == 4


def test_sample_takes_so_many_characters_of_each_domain(tmp_path: Path) -> None:
    data = tmp_path / "text.jsonl"
    rows = [{"domain": d, "text": d * 10} for _ in range(10) for d in ("a", "b", "c")]
    data.write_text("\n".join(map(json.dumps, rows)))
    sample(SampleConfig(data=str(data), out=tmp_path / "s.jsonl", domains=("b", "a"), characters=35))
    taken = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert Counter(row["domain"] for row in taken) == {"a": 3, "b": 3}
    with pytest.raises(ValueError, match=r"has no documents of \['z'\]"):
        sample(SampleConfig(data=str(data), out=tmp_path / "t.jsonl", domains=("z",)))
