"""The recipe of the bundled model: shares, packing, and a run from text to a checkpoint."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from moekit.moe import expert_layers
from moekit.scripts.pretrain import END_ID, PretrainConfig, domain_shares, main, pack
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


def test_packing_keeps_the_shares_and_ends_every_document() -> None:
    tokens = {"a": [[10] * 5, [11] * 7], "b": [[20] * 3, [21] * 9]}
    stream = pack(tokens, {"a": 0.75, "b": 0.25}, length=4000, eos=END_ID, seed=0)
    assert stream.shape == (4000,)
    counts = Counter(stream.tolist())
    of_a = counts[10] + counts[11] + counts[10] // 5 + counts[11] // 7
    assert of_a / 4000 == pytest.approx(0.75, abs=0.01)
    documents = " ".join(map(str, stream.tolist())).split(f" {END_ID} ")
    assert set(documents[:-1]) == {" ".join([str(i)] * n) for i, n in ((10, 5), (11, 7), (20, 3), (21, 9))}
    assert torch.equal(stream, pack(tokens, {"a": 0.75, "b": 0.25}, length=4000, eos=END_ID, seed=0))
    assert not torch.equal(stream, pack(tokens, {"a": 0.75, "b": 0.25}, length=4000, eos=END_ID, seed=1))


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


def test_sample_takes_so_many_characters_of_each_domain(tmp_path: Path) -> None:
    data = tmp_path / "text.jsonl"
    rows = [{"domain": d, "text": d * 10} for _ in range(10) for d in ("a", "b", "c")]
    data.write_text("\n".join(map(json.dumps, rows)))
    sample(SampleConfig(data=str(data), out=tmp_path / "s.jsonl", domains=("b", "a"), characters=35))
    taken = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert Counter(row["domain"] for row in taken) == {"a": 3, "b": 3}
    with pytest.raises(ValueError, match=r"has no documents of \['z'\]"):
        sample(SampleConfig(data=str(data), out=tmp_path / "t.jsonl", domains=("z",)))
