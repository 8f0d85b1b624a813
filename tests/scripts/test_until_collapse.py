"""`moekit compress --until-collapse-risk`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from moekit.compress.plan import CompressionPlan
from moekit.compress.retained_quality import context_information, retained_quality
from moekit.moe import expert_layers
from moekit.moe.data import TokenBlocks
from moekit.scripts import cli, until_collapse
from moekit.scripts.collapse_store import add_run, read_runs
from moekit.scripts.load import load_model
from moekit.scripts.staging import partial_folder
from safetensors.torch import load_file

from .tiny_checkpoints import TEXT_OPTIONS, tiny_qwen


def words(model: Path, data: Path, out: Path, *more: object) -> list[str]:
    given = ["--data", data, "--method", "reap", "--out", out, "--until-collapse-risk", 0.3, *more]
    return ["compress", str(model), *TEXT_OPTIONS, *map(str, given)]


def descent(out: Path) -> dict:
    return json.loads((out / "run.json").read_text(encoding="utf-8"))["descent"]


@pytest.fixture(scope="module")
def finished(checkpoint, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("descent") / "out"
    assert cli.main(words(checkpoint, data, out, "--quality-floor", 0.5)) == 0
    return out


def test_quality_is_one_for_the_model_itself_and_about_zero_for_one_without_context():
    model = tiny_qwen().eval()
    ids = torch.randint(2, 300, (6, 32), generator=torch.Generator().manual_seed(0))
    blocks = TokenBlocks(ids, torch.ones_like(ids), ("x",) * 6)
    information = context_information(model, blocks, 4)
    with torch.no_grad():
        probabilities = model(input_ids=ids).logits[:, :-1].double().softmax(-1).flatten(0, 1)
    mean = probabilities.mean(0)
    wanted = (probabilities * (probabilities.log() - mean.log())).sum(-1).mean()
    assert information == pytest.approx(float(wanted), rel=1e-4)
    assert information == pytest.approx(context_information(model, blocks, 2), rel=1e-6)
    assert retained_quality(model, model, blocks, information) == pytest.approx(1, abs=1e-6)
    flat = tiny_qwen().eval()
    with torch.no_grad():  # the last norm says the same of every token, which is the mean prediction
        flat.model.norm.weight.zero_()
        flat.lm_head.weight.zero_()
    assert retained_quality(model, flat, blocks, information) < 0.05


def test_it_ends_above_the_floor_and_says_why(finished):
    found = descent(finished)
    kept = [cut for cut in found["cuts"] if cut["is_kept"]]
    assert kept
    assert all(cut["quality"] >= 0.5 for cut in kept)
    assert all(cut["risk"] <= 0.3 for cut in found["cuts"])
    assert found["stop"]
    layers = expert_layers(load_model(str(finished)))
    assert {layer.num_experts for layer in layers} == {kept[-1]["experts"]}
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "How far it could be cut" in page
    assert not partial_folder(finished).exists()


def test_the_plan_is_from_the_original_to_what_is_left(finished, checkpoint):
    plan = CompressionPlan.load(finished / "plan.json")
    original = load_file(checkpoint / "model.safetensors")
    written = load_file(finished / "model.safetensors")
    for number, layer in enumerate(plan.layers):
        assert layer.num_experts == 8
        name = f"model.layers.{number}.mlp"
        assert torch.equal(written[f"{name}.gate.weight"], original[f"{name}.gate.weight"][layer.cores])
        for index, core in enumerate(layer.cores):
            weight = f"{name}.experts.{{}}.down_proj.weight"
            assert torch.equal(written[weight.format(index)], original[weight.format(core)])


def test_no_risk_stops_at_once(checkpoint, data, tmp_path, capsys):
    command = words(checkpoint, data, tmp_path / "out", "--no-report")
    command[command.index("--until-collapse-risk") + 1] = "0"
    assert cli.main(command) == 0
    assert "stopped at 8 of 8 experts" in capsys.readouterr().out
    assert descent(tmp_path / "out")["cuts"] == []


class KilledError(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("dies_at", [1, 2])
def test_killed_and_resumed_gives_the_same_decisions(
    finished, checkpoint, data, tmp_path, monkeypatch, dies_at
):
    command = words(checkpoint, data, tmp_path / "out", "--quality-floor", 0.5)
    own, calls = until_collapse.Descent._quality, []

    def dying(self: until_collapse.Descent) -> float:
        calls.append(1)
        if len(calls) > dies_at:
            raise KilledError
        return own(self)

    monkeypatch.setattr(until_collapse.Descent, "_quality", dying)
    with pytest.raises(KilledError):
        cli.main(command)
    assert partial_folder(tmp_path / "out").exists()
    monkeypatch.setattr(until_collapse.Descent, "_quality", own)
    assert cli.main(command) == 0
    before, after = descent(finished), descent(tmp_path / "out")
    assert before["cuts"] == after["cuts"]
    mine, theirs = (load_file(out / "model.safetensors") for out in (finished, tmp_path / "out"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def test_a_cut_that_went_too_far_is_taken_back(checkpoint, data, tmp_path, monkeypatch, capsys):
    own = until_collapse.Descent._quality

    def collapsing(self: until_collapse.Descent) -> float:
        experts = expert_layers(self.model)[0].num_experts
        return own(self) if experts > 5 else 0.1

    monkeypatch.setattr(until_collapse.Descent, "_quality", collapsing)
    command = words(checkpoint, data, tmp_path / "out", "--quality-floor", 0.5, "--no-report")
    command[command.index("--until-collapse-risk") + 1] = "1"
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "back to the last good state" in said
    found = descent(tmp_path / "out")
    lost = [cut["experts"] for cut in found["cuts"] if not cut["is_kept"]]
    kept = [cut["experts"] for cut in found["cuts"] if cut["is_kept"]]
    assert lost
    reached = expert_layers(load_model(str(tmp_path / "out")))[0].num_experts
    assert reached == (kept[-1] if kept else 8) > max(lost)


def test_healing_between_the_cuts(checkpoint, data, tmp_path):
    out = tmp_path / "out"
    more = ("--quality-floor", 0.5, "--heal", "router", "--heal-steps", 4, "--heal-learning-rate", 0.01)
    assert cli.main(words(checkpoint, data, out, *more, "--no-report")) == 0
    run = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert run["healing"]["mode"] == "router"
    assert not list(partial_folder(out).parent.glob("healing-*"))


def test_runs_are_kept_for_later_ones(checkpoint, data, tmp_path):
    store = tmp_path / "store" / "runs.jsonl"
    more = ("--quality-floor", 0.5, "--collapse-store", store, "--no-report")
    assert cli.main(words(checkpoint, data, tmp_path / "one", *more)) == 0
    plan = CompressionPlan.load(tmp_path / "one" / "plan.json")
    runs = read_runs(store, plan.model.fingerprint)
    assert [list(run.items()) for run in runs] == [
        [(cut["experts"] / 8, cut["quality"]) for cut in descent(tmp_path / "one")["cuts"]]
    ]
    assert read_runs(store, "another") == []
    add_run(store, plan.model.fingerprint, "m", [(0.5, 0.9)])
    assert len(read_runs(store, plan.model.fingerprint)) == 2
    assert cli.main(words(checkpoint, data, tmp_path / "two", *more)) == 0
    store.write_text("{}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 1 of .* is no run"):
        read_runs(store, "x")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--quality-floor", 1.1), "above the present quality"),
        (("--experts", 4), "give one of"),
        (("--method", "m-smoe"), "take one that prunes"),
        (("--rank", 4), "--until-collapse-risk and --rank exclude each other"),
        (("--grouping", "sensitivity"), "--until-collapse-risk and --grouping sensitivity exclude"),
        (("--stream", "--no-report"), "--until-collapse-risk and --stream exclude"),
        (("--plan-only",), "exclude each other"),
    ],
)
def test_what_is_refused(checkpoint, data, tmp_path, capsys, more, message):
    assert cli.main(words(checkpoint, data, tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("risk", ["-0.1", "1.5", "nan"])
def test_risks_that_are_none(checkpoint, data, tmp_path, capsys, risk):
    command = words(checkpoint, data, tmp_path / "out")
    command[command.index("--until-collapse-risk") + 1] = risk
    assert cli.main(command) == 2
    assert "is not a probability" in capsys.readouterr().err


def test_options_that_belong_to_it(checkpoint, data, tmp_path, capsys):
    command = ["compress", str(checkpoint), *TEXT_OPTIONS, "--data", str(data), "--experts", "4"]
    assert cli.main([*command, "--out", str(tmp_path / "out"), "--quality-floor", "0.5"]) == 2
    assert "--quality-floor is of --until-collapse-risk" in capsys.readouterr().err


def test_layers_of_different_sizes(checkpoint, data, tmp_path, capsys):
    uneven = [
        "compress",
        str(checkpoint),
        *TEXT_OPTIONS,
        "--data",
        str(data),
        "--method",
        "reap",
        "--no-report",
    ]
    assert cli.main([*uneven, "--layer-experts", "8", "4", "--out", str(tmp_path / "uneven")]) == 0
    assert cli.main(words(tmp_path / "uneven", data, tmp_path / "out")) == 2
    assert "the layers have 4, 8 experts" in capsys.readouterr().err


def test_a_copy_of_the_checkpoint_goes_down_alike(finished, checkpoint, data, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "copy")
    assert (
        cli.main(words(tmp_path / "copy", data, tmp_path / "out", "--quality-floor", 0.5, "--no-report")) == 0
    )
    assert descent(tmp_path / "out")["cuts"] == descent(finished)["cuts"]
