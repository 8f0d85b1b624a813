"""A plan: JSON that survives a round trip and an edit, and refuses every slip with what, where, allowed."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest
from moekit.compress.layer_plan import ExpertGroup, LayerPlan, keep_experts
from moekit.compress.plan import AlignmentRule, CompressionPlan, ModelIdentity, check_form

from .plan_samples import edited, layers_of


def group(*experts: int, weights: tuple[float, ...] | None = None, core: int | None = None, reference=None):
    core = experts[0] if core is None and experts else core
    return ExpertGroup(
        experts=experts,
        weights=tuple(1 / len(experts) for _ in experts) if weights is None else weights,
        core=core or 0,
        reference=(core or 0) if reference is None else reference,
    )


def layer_plan(*groups: ExpertGroup, name="model.layers.0.mlp", num_experts=8, top_k=2) -> LayerPlan:
    return LayerPlan(name=name, num_experts=num_experts, top_k=top_k, groups=groups)


PAIRS = (group(0, 1), group(2, 3), group(4, 5), group(6, 7))


def sample(family: str = "qwen3_moe", groups=PAIRS, **options) -> CompressionPlan:
    layers = layers_of(family)
    planned = tuple(
        layer_plan(*groups, name=layer.name, num_experts=layer.num_experts, top_k=layer.top_k)
        for layer in layers
    )
    defaults = {
        "method": "by hand",
        "form": "moekit",
        "router": "redirect",
        "requested_experts": len(groups) * len(layers),
    }
    return CompressionPlan(model=ModelIdentity.of(layers), layers=planned, **{**defaults, **options})


def test_json_round_trip_keeps_everything(tmp_path) -> None:
    thirds = group(0, 3, 5, weights=(1 / 3, 0.1, 1 - 1 / 3 - 0.1), core=3, reference=0)
    plan = sample(
        groups=(thirds, group(1, 2), group(4), group(6, 7)),
        settings={"experts": 4, "ratio": None, "exclude_layers": [0, 2], "similarity": "weights"},
        notes=("a note",),
        alignment=AlignmentRule(method="none", include_down=False),
    )
    again = CompressionPlan.from_json(plan.to_json())
    assert again == plan
    assert again.hash == plan.hash
    path = plan.save(tmp_path / "new" / "plan.json")
    assert CompressionPlan.load(path) == plan
    assert [file.name for file in path.parent.iterdir()] == ["plan.json"]


def test_json_is_laid_out_for_people() -> None:
    lines = sample().to_json().splitlines()
    assert ' "requested_experts": 12,' in lines
    assert lines.count('    {"experts": [2, 3], "weights": [0.5, 0.5], "core": 2, "reference": 2},') == 3
    assert max(len(line) for line in lines) < 120
    assert json.loads(sample().to_json())["actual_experts"] == 12


def test_hash_depends_on_contents_and_not_on_layout() -> None:
    plan = sample()
    assert CompressionPlan.from_json(json.dumps(json.loads(plan.to_json()))).hash == plan.hash
    assert sample(groups=(group(0, 2), group(1, 3), *PAIRS[2:])).hash != plan.hash


def test_an_edited_plan_is_accepted_and_counted_anew() -> None:
    def change(data):
        data["layers"][0]["groups"] = [
            {"experts": [0, 1, 2], "weights": [0.333, 0.333, 0.333], "core": 2, "reference": 0},
            {"experts": [3, 4, 5, 6, 7], "weights": [1, 0, 0, 0, 0], "core": 4, "reference": 3},
        ]

    plan = CompressionPlan.from_json(edited(sample(), change))
    plan.validate_against(layers_of("qwen3_moe"))
    assert (plan.requested_experts, plan.actual_experts) == (12, 10)
    assert plan.layers[0].expert_map == [0, 0, 0, 1, 1, 1, 1, 1]
    assert plan.layers[0].cores == [2, 4]
    assert plan.layers[0].groups[1].weights == (1.0, 0.0, 0.0, 0.0, 0.0)


def test_facts_of_a_layer_with_removed_experts() -> None:
    planned = layer_plan(group(5), group(2, 0, core=0))
    assert planned.removed == [1, 3, 4, 6, 7]
    assert planned.group_of == [1, None, 1, None, None, 0, None, None]
    assert sorted(set(planned.expert_map)) == [0, 1]
    assert not planned.is_identity
    assert keep_experts("a", 4, 2).is_identity
    assert not keep_experts("a", 4, 2, [0, 1, 3]).is_identity
    assert not layer_plan(*(group(e) for e in (1, 0, *range(2, 8)))).is_identity


def test_summary_shows_each_layer_and_the_core_first() -> None:
    layers = sample().layers
    mixed = (
        layer_plan(group(0, 4, core=4), group(1), *(group(e) for e in (2, 3, 5)), name=layers[0].name),
        keep_experts(layers[1].name, 8, 2),
        layers[2],
    )
    plan = sample(router="slice", notes=("look here",))
    lines = dataclasses.replace(plan, layers=mixed).summary().splitlines()
    assert lines[0] == ("by hand for qwen3_moe: 24 -> 17 experts (12 requested), router slice, form moekit")
    assert lines[1].split() == ["layer", "experts", "groups"]
    assert lines[2] == "model.layers.0.mlp   8 -> 5  4+0  1  2  3  5  (2 removed)"
    assert lines[3].endswith("8 -> 8  as it is")
    assert lines[5] == "note: look here"


def test_a_plan_is_read_without_torch(tmp_path) -> None:
    path = sample().save(tmp_path / "plan.json")
    code = (
        "import sys, importlib.util, types\n"
        "package = types.ModuleType('p'); package.__path__ = [sys.argv[1]]; sys.modules['p'] = package\n"
        "from p.plan import CompressionPlan\n"
        "print(CompressionPlan.load(sys.argv[2]).actual_experts, 'torch' in sys.modules)\n"
    )
    import moekit.compress.plan as module

    folder = module.__file__.rpartition("/")[0]
    done = subprocess.run(
        [sys.executable, "-c", code, folder, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["12", "False"]


def groups_are(*groups):
    def change(data):
        data["layers"][1]["groups"] = [dataclasses.asdict(g) for g in groups]

    return change


def setting(path: str, value):
    """An edit that puts ``value`` at a dotted path; a number indexes a list."""

    def change(data):
        *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        for key in parents:
            data = data[key]
        data[last] = value

    return change


REFUSED_TEXTS = {
    "two groups": (
        groups_are(group(0, 1), group(1, 2, 3), group(4, 5, 6, 7)),
        r"expert 1 is in groups 0 and 1 \(layer 'model.layers.1.mlp'\)",
    ),
    "empty group": (
        groups_are(*PAIRS, ExpertGroup(experts=(), weights=(), core=0, reference=0)),
        r"group 4 is empty \(layer 'model.layers.1.mlp'\); give it an expert or take it out",
    ),
    "id too high": (groups_are(group(0, 8), *PAIRS[1:]), "expert 8 of group 0 is not between 0 and 7"),
    "id negative": (groups_are(group(0, -1), *PAIRS[1:]), "expert -1 of group 0 is not between 0 and 7"),
    "reference": (
        groups_are(group(0, 1, reference=9), *PAIRS[1:]),
        "reference 9 of group 0 is not between 0 and 7",
    ),
    "number of weights": (
        groups_are(group(0, 1, weights=(1.0,)), *PAIRS[1:]),
        r"group 0 has 2 experts but 1 weights \(layer 'model.layers.1.mlp'\)",
    ),
    "negative weight": (
        groups_are(group(0, 1, weights=(1.5, -0.5)), *PAIRS[1:]),
        r"weights \[1.5, -0.5\] of group 0 must be finite and not negative",
    ),
    "sum of weights": (
        groups_are(group(0, 1, weights=(0.5, 0.6)), *PAIRS[1:]),
        r"weights \[0.5, 0.6\] of group 0 sum to 1.1, not 1 \(layer 'model.layers.1.mlp'\)",
    ),
    "core elsewhere": (
        groups_are(group(0, 1, core=2), *PAIRS[1:]),
        r"core 2 of group 0 is not one of its experts \[0, 1\]",
    ),
    "left out": (
        groups_are(*PAIRS[:3]),
        r"experts \[6, 7\] are in no group \(layer 'model.layers.1.mlp'\), but router='redirect'",
    ),
    "fewer than top_k": (
        groups_are(group(*range(8))),
        "1 groups are fewer than top_k=2 .*make at least 2",
    ),
    "top_k": (setting("layers.0.top_k", 9), "top_k=9 is not between 1 and 8 experts"),
    "layer twice": (setting("layers.0.name", "model.layers.1.mlp"), "'model.layers.1.mlp' occurs twice"),
    "no layers": (setting("layers", []), "the plan has no layers"),
    "form": (setting("form", "onnx"), "form='onnx' is not one of moekit, stock"),
    "router": (setting("router", "magic"), "router='magic' is not one of redirect, slice, mean, logsumexp"),
    "stock redirect": (setting("form", "stock"), "router='redirect' keeps a row for every expert"),
    "alignment": (
        setting("alignment.method", "x"),
        "alignment method 'x' is not one of weights, activations, both, none",
    ),
    "format": (setting("format", "other"), "'format' must be 'moekit.plan'"),
    "version": (setting("version", 2), "its version is 2; this moekit reads 1"),
    "unknown key": (setting("colour", "red"), "plan has the unknown key 'colour'; known are model"),
    "unknown key below": (
        setting("layers.0.groups.1.waits", []),
        r"plan.layers\[0\].groups\[1\] has the unknown key 'waits'; known are experts, weights, core",
    ),
    "missing key": (lambda data: data["layers"][2].pop("groups"), r"plan.layers\[2\] lacks the key 'groups'"),
    "text for number": (
        setting("layers.0.groups.0.core", "0"),
        r'plan.layers\[0\].groups\[0\].core is "0", not a whole number',
    ),
    "truth for number": (setting("layers.0.top_k", True), "top_k is true, not a whole number"),
    "fraction of an expert": (
        setting("layers.0.groups.0.experts", [0, 1.5]),
        r"experts\[1\] is 1.5, not a whole",
    ),
    "number for list": (setting("layers.0.groups.0.experts", 0), "experts is 0, not a list"),
    "list for table": (setting("model", []), r"plan.model is \[\], not a table"),
    "nested setting": (setting("settings", {"a": {"b": 1}}), "plan.settings.a is .* not a text, a finite"),
    "settings": (setting("settings", 3), "plan.settings is 3, not a table"),
}


@pytest.mark.parametrize("case", REFUSED_TEXTS)
def test_a_wrong_edit_is_refused_with_what_and_where(case: str) -> None:
    change, message = REFUSED_TEXTS[case]
    with pytest.raises(ValueError, match=message):
        CompressionPlan.from_json(edited(sample(), change))


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused(literal: str) -> None:
    text = sample().to_json().replace("[0.5, 0.5]", f"[0.5, {literal}]", 1)
    with pytest.raises(ValueError, match="finite number"):
        CompressionPlan.from_json(text)


def test_weights_that_are_not_finite_are_refused_in_python_too() -> None:
    with pytest.raises(ValueError, match="must be finite and not negative"):
        layer_plan(group(0, 1, weights=(math.nan, 1.0)), *PAIRS[1:])


def test_a_key_that_is_written_twice_is_refused() -> None:
    text = sample().to_json().replace('"core": 2,', '"core": 2, "core": 3,', 1)
    with pytest.raises(ValueError, match="holds the key 'core' twice"):
        CompressionPlan.from_json(text)


@pytest.mark.parametrize("content", ["", "[]", "{", '"text"', "3"])
def test_a_file_that_is_no_plan_is_refused_by_name(tmp_path, content: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"mine.json"):
        CompressionPlan.load(path)


def test_a_file_that_is_not_text_or_not_there_is_refused_by_name(tmp_path) -> None:
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ValueError, match=r"binary.json"):
        CompressionPlan.load(tmp_path / "binary.json")
    with pytest.raises(ValueError, match=r"there is no plan at '.*absent.json'"):
        CompressionPlan.load(tmp_path / "absent.json")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    path = sample().save(tmp_path / "plan.json")
    before = path.read_text()
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        sample(method="another").save(path)
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def with_layers(plan: CompressionPlan, *layers: LayerPlan) -> CompressionPlan:
    return dataclasses.replace(plan, layers=layers)


def test_a_plan_that_fits_is_accepted() -> None:
    for router in ("redirect", "slice", "mean", "logsumexp"):
        sample(router=router).validate_against(layers_of("qwen3_moe"))
    sample(router="slice", form="stock").validate_against(layers_of("qwen3_moe"))


def test_unknown_and_missing_layers_are_refused() -> None:
    plan = sample()
    first, *others = plan.layers
    with pytest.raises(
        ValueError, match=r"names layer 'model.layers.9.mlp', which is not among model.layers.0.mlp"
    ):
        with_layers(plan, dataclasses.replace(first, name="model.layers.9.mlp"), *others).validate_against(
            layers_of("qwen3_moe")
        )
    with pytest.raises(ValueError, match=r"leaves out layer 'model.layers.0.mlp'; to keep it"):
        with_layers(plan, *others).validate_against(layers_of("qwen3_moe"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 9}, "num_experts=9 in layer 'model.layers.0.mlp', which has 8; plan anew"),
        ({"top_k": 1}, "top_k=1 in layer 'model.layers.0.mlp', which has 2; plan anew"),
    ],
)
def test_other_sizes_are_refused(change, message: str) -> None:
    plan = sample(router="slice")
    first, *others = plan.layers
    with pytest.raises(ValueError, match=message):
        with_layers(plan, dataclasses.replace(first, **change), *others).validate_against(
            layers_of("qwen3_moe")
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtral"}, "its model_type is 'mixtral', this one's is 'qwen3_moe'"),
        ({"layer_class": "Other"}, "its layer_class is 'Other', this one's is 'Qwen3MoeSparseMoeBlock'"),
        ({"fingerprint": "0" * 16}, "same names but experts of other shapes"),
    ],
)
def test_another_model_is_refused(change, message: str) -> None:
    plan = sample()
    plan = dataclasses.replace(plan, model=dataclasses.replace(plan.model, **change))
    with pytest.raises(ValueError, match=message):
        plan.validate_against(layers_of("qwen3_moe"))


def test_the_plan_of_another_family_is_refused() -> None:
    with pytest.raises(ValueError, match="the plan is for another model: its model_type is 'olmoe'"):
        sample("olmoe").validate_against(layers_of("qwen3_moe"))


def test_stock_needs_one_number_of_experts() -> None:
    plan = sample(router="slice", form="stock")
    first, *others = plan.layers
    uneven = dataclasses.replace(first, groups=first.groups[:3])
    with pytest.raises(
        ValueError, match=r"got 3 of 8 in 'model.layers.0.mlp', 4 of 8 in .*use form='moekit'"
    ):
        with_layers(plan, uneven, *others)


@pytest.mark.parametrize("router", ["slice", "mean"])
def test_cut_rows_must_suit_a_group_limited_router(router: str) -> None:
    layers = layers_of("deepseek_v3")
    sample("deepseek_v3", router=router).validate_against(layers)
    lopsided = (group(0), group(1), group(2), group(4, 3, 5, 6, 7))
    with pytest.raises(ValueError, match=r"routes within 2 groups of 4 experts.*keep=\[0, 1, 2, 4\]"):
        sample("deepseek_v3", lopsided, router=router).validate_against(layers)
    sample("deepseek_v3", lopsided, router="redirect").validate_against(layers)


def test_logsumexp_needs_a_softmax_router() -> None:
    with pytest.raises(
        ValueError, match=r"router='logsumexp' needs a softmax router; layer 'model.layers.1.mlp'"
    ):
        sample("deepseek_v3", router="logsumexp").validate_against(layers_of("deepseek_v3"))


@pytest.mark.parametrize("router", ["redirect", "logsumexp"])
def test_a_stock_checkpoint_cannot_hold_all_rows(router: str) -> None:
    with pytest.raises(
        ValueError, match=f"router='{router}' keeps a row for every expert.*use router='slice'"
    ):
        check_form("stock", router)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "it is nested too deeply"),
        ('{"format": "\\ud800"}', "surrogate pair"),
        ('{"format": ' + "1" * 5000 + "}", "digits"),
    ],
)
def test_json_that_python_cannot_take_is_refused(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"plan '.*plan.json': .*{message}"):
        CompressionPlan.load(path)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("layers.1.groups.0.weights", [10**400, 1], r"weights\[0\] is 1000.*, larger than any float"),
        ("layers.1.num_experts", 10**12, r"layers\[1\].num_experts is 1000000000000, more than 100,000"),
    ],
)
def test_numbers_beyond_all_use_are_refused(path: str, value, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompressionPlan.from_json(edited(sample(), setting(path, value)))
