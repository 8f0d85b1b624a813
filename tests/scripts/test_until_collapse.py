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
    gains = found["gain_map"]
    assert gains["sizes"] == [8, 7, 6, 5, 4, 3, 2]
    assert [step["quality"] for step in gains["steps"]] == [cut["quality"] for cut in found["cuts"]]
    assert all("below the floor with" in cut["reason"] for cut in found["cuts"])
    assert gains["steps"][0]["further"].startswith(f"{found['cuts'][0]['size'] - 1} experts: ")
    layers = expert_layers(load_model(str(finished)))
    assert {layer.num_experts for layer in layers} == {kept[-1]["size"]}
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
    assert "stopped at 8 experts (of 8)" in capsys.readouterr().out
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
    lost = [cut["size"] for cut in found["cuts"] if not cut["is_kept"]]
    kept = [cut["size"] for cut in found["cuts"] if cut["is_kept"]]
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


def test_runs_are_kept_for_later_ones(checkpoint, data, tmp_path, capsys):
    store = tmp_path / "store" / "runs.jsonl"
    more = ("--quality-floor", 0.5, "--collapse-store", store, "--no-report")
    assert cli.main(words(checkpoint, data, tmp_path / "one", *more)) == 0
    kind = json.loads(store.read_text(encoding="utf-8"))["kind"]
    assert (
        read_runs(store, kind)
        == read_runs(store)
        == [[(cut["size"] / 8, cut["quality"]) for cut in descent(tmp_path / "one")["cuts"]]]
    )
    for other in ({"taken": {"experts": "ean"}}, {"data": "other.jsonl"}, {"healing": ["kd", 9, None]}):
        assert read_runs(store, kind | other) == []
    store.write_text(store.read_text(encoding="utf-8").rstrip("\n"), encoding="utf-8")
    add_run(store, kind, "m", [(0.5, 0.9)])
    assert len(read_runs(store, kind)) == 2
    assert cli.main(words(checkpoint, data, tmp_path / "two", *more)) == 0
    assert "expecting what 2 earlier run(s) saw" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}\n", "line 1 of"),
        (b'{"kind": {}, "points": [[0.5, NaN]]}\n', "line 1 of"),
        (b'{"kind": {}, "points": [[0.5, 0.9]]}\n{"kind": {}, "poi', "line 2 of"),
        (b"\xff\xfe\x00", "is no file of text lines"),
        (None, "is no file of text lines"),
    ],
)
def test_stores_that_are_none_are_refused_before_any_work(
    checkpoint, data, tmp_path, capsys, content, message
):
    store = tmp_path / "store"
    store.mkdir() if content is None else store.write_bytes(content)
    assert cli.main(words(checkpoint, data, tmp_path / "out", "--collapse-store", store)) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert "Loading" not in said.out
    assert not (tmp_path / "out").exists()


def test_a_store_that_changes_meanwhile_changes_nothing(checkpoint, data, tmp_path, monkeypatch):
    store = tmp_path / "runs.jsonl"
    more = ("--quality-floor", 0.5, "--no-report", "--collapse-store", store)
    assert cli.main(words(checkpoint, data, tmp_path / "whole", *more)) == 0
    store.unlink()
    kind = None
    own, calls = until_collapse.Descent._quality, []

    def dying(self: until_collapse.Descent) -> float:
        nonlocal kind
        kind = until_collapse.run_kind(self.job, self.cuts.identity.fingerprint)
        calls.append(1)
        if len(calls) > 1:
            raise KilledError
        return own(self)

    monkeypatch.setattr(until_collapse.Descent, "_quality", dying)
    command = words(checkpoint, data, tmp_path / "out", *more)
    with pytest.raises(KilledError):
        cli.main(command)
    monkeypatch.setattr(until_collapse.Descent, "_quality", own)
    add_run(store, kind, "m", [(0.9, 0.1)])  # would stop it at once
    assert cli.main(command) == 0
    assert descent(tmp_path / "out")["cuts"] == descent(tmp_path / "whole")["cuts"]


def test_a_run_that_was_killed_late_still_tells_its_healing(checkpoint, data, tmp_path, monkeypatch):
    more = ("--quality-floor", 0.5, "--heal", "router", "--heal-steps", 2, "--no-report")
    command = words(checkpoint, data, tmp_path / "out", *more)
    own = until_collapse.Descent._plan

    def dying(self: until_collapse.Descent) -> CompressionPlan:
        raise KilledError

    monkeypatch.setattr(until_collapse.Descent, "_plan", dying)
    with pytest.raises(KilledError):
        cli.main(command)
    monkeypatch.setattr(until_collapse.Descent, "_plan", own)
    assert cli.main(command) == 0
    run = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    assert run["healing"]["steps"] == 2


def test_a_method_without_data_still_needs_data_to_measure(checkpoint, tmp_path, capsys):
    command = ["compress", str(checkpoint), "--method", "aimer", "--no-report", "--until-collapse-risk"]
    assert cli.main([*command, "0.3", "--out", str(tmp_path / "out")]) == 2
    assert "--data" in capsys.readouterr().err


def test_the_best_preset_cuts_every_layer_alike(checkpoint, data, tmp_path):
    command = ["compress", str(checkpoint), *TEXT_OPTIONS, "--data", str(data), "--preset", "best"]
    more = ("--until-collapse-risk", "0.3", "--quality-floor", "0.5", "--heal-steps", "2", "--no-report")
    assert cli.main([*command, *more, "--out", str(tmp_path / "out")]) == 0
    run = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    assert run["healing"]["mode"] == "router"
    assert CompressionPlan.load(tmp_path / "out" / "plan.json").method == "ean"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--quality-floor", 1.1), "above the present quality"),
        (("--quality-floor", "-inf"), "is no quality"),
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


def rank_words(model: Path, data: Path, out: Path, *more: object) -> list[str]:
    given = ["--data", data, "--out", out, "--until-collapse-risk", 0.3, "--take", "rank", *more]
    return ["compress", str(model), *TEXT_OPTIONS, *map(str, given)]


@pytest.fixture(scope="module")
def of_lower_rank(checkpoint, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("rank") / "out"
    assert cli.main(rank_words(checkpoint, data, out, "--quality-floor", 0.5)) == 0
    return out


def test_rank_is_cut_too(of_lower_rank):
    found = descent(of_lower_rank)
    kept = [cut for cut in found["cuts"] if cut["is_kept"]]
    assert kept
    assert all(cut["quality"] >= 0.5 for cut in kept)
    gains = found["gain_map"]
    assert gains["unit"] == "rank of the experts' matrices"
    assert gains["sizes"] == sorted(gains["sizes"], reverse=True)
    assert gains["num_bytes"] == sorted(set(gains["num_bytes"]), reverse=True)
    assert [step["size"] for step in gains["steps"]] == [f"rank {cut['size']}" for cut in found["cuts"]]
    plan = CompressionPlan.load(of_lower_rank / "plan.json")
    assert plan.low_rank is not None
    assert plan.low_rank.rank == kept[-1]["size"]
    assert plan.method == "low-rank"
    assert all(layer.is_identity for layer in plan.layers)
    at = gains["sizes"].index(kept[-1]["size"])
    facts = json.loads((of_lower_rank / "run.json").read_text(encoding="utf-8"))["metrics"]["footprint"]
    assert gains["num_bytes"][at] == sum(facts["after"]["bytes"].values())
    assert f"rank {kept[-1]['size']}" in (of_lower_rank / "report.html").read_text(encoding="utf-8")


def test_it_ends_with_what_one_cut_gives(of_lower_rank, checkpoint, data, tmp_path):
    """Factors are of the original's matrices, and not of factors."""
    rank = descent(of_lower_rank)["cuts"][-1]["size"]
    given = ["--data", data, "--out", tmp_path / "out", "--ratio", 1, "--rank", rank, "--no-report"]
    assert cli.main(["compress", str(checkpoint), *TEXT_OPTIONS, *map(str, given)]) == 0
    mine, theirs = (load_file(out / "model.safetensors") for out in (of_lower_rank, tmp_path / "out"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def test_cuts_of_rank_go_on_after_a_kill(of_lower_rank, checkpoint, data, tmp_path, monkeypatch):
    command = rank_words(checkpoint, data, tmp_path / "out", "--quality-floor", 0.5)
    own, calls = until_collapse.Descent._quality, []

    def dying(self: until_collapse.Descent) -> float:
        calls.append(1)
        if len(calls) > 1:
            raise KilledError
        return own(self)

    monkeypatch.setattr(until_collapse.Descent, "_quality", dying)
    with pytest.raises(KilledError):
        cli.main(command)
    monkeypatch.setattr(until_collapse.Descent, "_quality", own)
    assert cli.main(command) == 0
    assert descent(of_lower_rank)["cuts"] == descent(tmp_path / "out")["cuts"]


def test_experts_first_and_then_rank(finished, data, tmp_path):
    """A model that was cut already can be cut on."""
    command = rank_words(finished, data, tmp_path / "out", "--quality-floor", 0.5, "--sparse-rows", 0.125)
    assert cli.main([*command, "--heal", "router", "--heal-steps", "2", "--no-report"]) == 0
    cuts = [cut for cut in descent(tmp_path / "out")["cuts"] if cut["is_kept"]]
    facts = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))["metrics"]["footprint"]
    left = facts["after"]["bytes"]["experts"] / facts["before"]["bytes"]["experts"]
    assert cuts[-1]["share"] == pytest.approx(left, abs=0.05)
    layers = expert_layers(load_model(str(tmp_path / "out")))
    assert {layer.num_experts for layer in layers} == {
        len(expert_layers(load_model(str(finished)))[0].experts())
    }


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--method", "reap"), "--take rank keeps all experts, so there is nothing for --method to decide"),
        (("--alignment", "activations"), "nothing for --alignment to decide"),
        (("--no-protect",), "nothing for --protect to decide"),
        (("--form", "stock"), "--take rank needs --form moekit"),
        (("--rank", 4), "--until-collapse-risk and --rank exclude each other"),
        (("--sparse-rows", 1), "is not a share from 0 to below 1"),
        (("--sparse-rows", 0.99), "no rank saves bytes beside --sparse-rows 0.99"),
    ],
)
def test_cuts_of_rank_that_are_refused(checkpoint, data, tmp_path, capsys, more, message):
    assert cli.main(rank_words(checkpoint, data, tmp_path / "out", *more)) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_factors_are_not_cut_again(of_lower_rank, data, tmp_path, capsys):
    assert cli.main(rank_words(of_lower_rank, data, tmp_path / "out")) == 2
    assert "are low-rank already" in capsys.readouterr().err


def test_what_is_taken_belongs_to_a_descent(checkpoint, data, tmp_path, capsys):
    command = ["compress", str(checkpoint), *TEXT_OPTIONS, "--data", str(data), "--experts", "4"]
    assert cli.main([*command, "--out", str(tmp_path / "out"), "--take", "rank"]) == 2
    assert "--take is of --until-collapse-risk" in capsys.readouterr().err


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
