"""``W = U V + S``: the mathematics, the layers, and the checkpoint."""

import copy
import json

import pytest
import torch
from moekit.compress import METHODS, apply_plan
from moekit.compress.low_rank import RowPruner, RowPruning, decompose, factorise_layer, kept_share
from moekit.compress.low_rank.decompose import second_moment
from moekit.compress.plan import CompressionPlan, LowRankRule
from moekit.moe import expert_layers, record_inputs, save_checkpoint
from moekit.moe.checkpoint import MoekitConfig
from moekit.moe.low_rank import LowRankMap
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainerControl, TrainerState, TrainingArguments

from ..moe.samples import close, fresh_case, logits
from .plan_samples import layers_of, statistics

FUSED = ["qwen3_moe", "mixtral", "olmoe", "gpt_oss", "deepseek_v3"]


def matrix(seed=0, shape=(12, 8)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(seed=1, size=8):
    inputs = torch.randn(40, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return second_moment(inputs * torch.linspace(0.1, 3, size)), inputs * torch.linspace(0.1, 3, size)


@pytest.mark.parametrize("weighted", [False, True])
def test_full_rank_gives_the_matrix_back(weighted):
    weight = matrix()
    found = decompose(weight, 8, 0, moment()[0] if weighted else None)
    torch.testing.assert_close(found.dense(), weight, rtol=1e-9, atol=1e-9)


def test_all_rows_give_the_matrix_back():
    weight = matrix()
    torch.testing.assert_close(decompose(weight, 2, 12).dense(), weight, rtol=1e-12, atol=1e-12)


def test_rows_are_those_of_the_largest_residual():
    weight = matrix()
    plain = decompose(weight, 2)
    found = decompose(weight, 2, 3)
    residual = (weight - plain.dense()).norm(dim=1)
    assert found.row_index.tolist() == sorted(residual.argsort(descending=True)[:3].tolist())
    torch.testing.assert_close(found.dense()[found.row_index], weight[found.row_index])
    others = [row for row in range(12) if row not in found.row_index]
    torch.testing.assert_close(found.dense()[others], plain.dense()[others])


def test_weighting_by_what_is_read_has_the_smaller_output_error():
    weight = matrix()
    second, inputs = moment()

    def error(found):
        return ((found.dense() - weight) @ inputs.T).norm()

    assert error(decompose(weight, 3, 0, second)) < 0.95 * error(decompose(weight, 3))
    # And a plain decomposition is the best by the matrix itself.
    assert (decompose(weight, 3).dense() - weight).norm() < (
        decompose(weight, 3, 0, second).dense() - weight
    ).norm()


@pytest.mark.parametrize(
    ("rank", "rows"), [(0, 0), (9, 0), (2, 13), (2, -1)], ids=["rank 0", "rank 9", "13 rows", "-1 rows"]
)
def test_factors_that_no_matrix_has(rank, rows):
    with pytest.raises(ValueError, match="do not fit a matrix of 12 x 8"):
        decompose(matrix(), rank, rows)


def test_numbers_that_are_none():
    with pytest.raises(ValueError, match="NaN or infinity"):
        decompose(matrix() * torch.nan, 2)


@pytest.mark.parametrize("family", FUSED)
def test_a_layer_runs_as_with_its_factors_multiplied_out(family):
    model, inputs, _ = fresh_case(family)
    with record_inputs(model) as samples:
        logits(model, inputs)
    dense = copy.deepcopy(model)
    for layer, other in zip(expert_layers(model), expert_layers(dense), strict=True):
        rank = min(layer.experts()[0].width, layer.hidden_size) // 2
        errors = factorise_layer(layer, rank, 0.25, samples.layers[layer.name])
        assert 0 < errors["error_up"] < 1
        assert 0 < errors["error_down"] < 1
        other.replace_experts(layer.experts(), range(layer.num_experts))
    assert len(expert_layers(model)) == len(expert_layers(dense))
    close(logits(model, inputs), logits(dense, inputs))


@pytest.mark.parametrize("family", FUSED)
def test_full_rank_changes_nothing(family):
    model, inputs, expected = fresh_case(family)
    for layer in expert_layers(model):
        factorise_layer(layer, min(layer.experts()[0].width, layer.hidden_size), 1.0)
    close(logits(model, inputs), expected, tolerance=1e-4)


def planned(family="qwen3_moe", rank=4, sparse_rows=0.25, **options) -> CompressionPlan:
    plan = METHODS["m-smoe"](layers_of(family), statistics(family), experts=4, **options)
    data = json.loads(plan.to_json())
    data["low_rank"] = {"rank": rank, "sparse_rows": sparse_rows}
    return CompressionPlan.from_json(json.dumps(data))


@pytest.mark.parametrize("router", ["redirect", "slice", "logsumexp"])
def test_merged_factorised_saved_and_read_back(router, tmp_path):
    model, inputs, _ = fresh_case("qwen3_moe")
    report = apply_plan(model, planned(router=router))
    assert all("error_up" in entry for entry in report.values())
    expected = logits(model, inputs)
    assert save_checkpoint(model, tmp_path) == "moekit"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    close(logits(loaded, inputs), expected)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    # And again, from what was loaded.
    save_checkpoint(loaded, tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    close(logits(again, inputs), expected)


def test_it_can_be_trained():
    model, inputs, _ = fresh_case("qwen3_moe")
    apply_plan(model, planned())
    model.train()
    losses = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(5):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        losses.append(loss.item())
        maps = [module for module in model.modules() if isinstance(module, LowRankMap)]
        assert all(p.grad is not None for made in maps for p in made.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


def test_gradients_of_a_map():
    made = LowRankMap(3, 5, 4, 2, 2, torch.zeros(1, dtype=torch.float64, requires_grad=True))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        made.row_index.copy_(torch.tensor([[0, 3], [1, 2], [4, 0]]))
    offsets, experts = torch.tensor([2, 2, 5], dtype=torch.int32), torch.tensor([0, 0, 2, 2, 2])
    inputs = torch.randn(5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([made.dense(int(e)) @ x for e, x in zip(experts, inputs, strict=True)])
    torch.testing.assert_close(made(inputs, offsets, experts), expected)
    assert torch.autograd.gradcheck(lambda x, *_: made(x, offsets, experts), (inputs, *made.parameters()))


def test_what_a_plan_refuses():
    with pytest.raises(ValueError, match="rank of at least 1, got 0"):
        LowRankRule(rank=0)
    with pytest.raises(ValueError, match=r"sparse_rows=1.5 is not a share in \[0, 1\]"):
        LowRankRule(rank=1, sparse_rows=1.5)
    width = layers_of("qwen3_moe")[0].experts()[0].width
    with pytest.raises(ValueError, match=f"rank 500 is larger than the smaller side .*, {width}"):
        planned(rank=500).validate_against(layers_of("qwen3_moe"))
    with pytest.raises(ValueError, match="form='stock' has no low-rank experts"):
        planned(form="stock", router="slice", grouping="uniform")
    with pytest.raises(ValueError, match="cannot become low-rank"):
        planned("switch_transformers").validate_against(layers_of("switch_transformers"))


def test_low_rank_experts_are_not_merged_again():
    model, _, _ = fresh_case("qwen3_moe")
    layer = expert_layers(model)[0]
    factorise_layer(layer, 4, 0.0)
    with pytest.raises(ValueError, match="cannot be merged or removed"):
        layer.replace_experts(layer.experts()[:4], [e % 4 for e in range(8)])
    with pytest.raises(ValueError, match="are low-rank already"):
        factorise_layer(layer, 4, 0.0)


@pytest.mark.parametrize(
    "entry",
    [
        {"rank": 0, "rows": [0, 0]},
        {"rank": 2},
        {"rank": 2, "rows": [1]},
        {"rank": 2, "rows": [-1, 0]},
        3,
        None,
    ],
)
def test_hostile_configs(entry):
    layer = {"num_experts": 2, "num_router_rows": 4, "router": "redirect", "low_rank": entry}
    with pytest.raises(ValueError, match="is not a rank of at least 1 and two numbers of rows"):
        MoekitConfig(layers={"model.layers.0.mlp": layer})


@pytest.mark.parametrize("damage", ["outside", "twice", "missing", "rank"])
def test_damaged_checkpoints(damage, tmp_path):
    model, _, _ = fresh_case("qwen3_moe")
    apply_plan(model, planned())
    save_checkpoint(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("row_index"))
    if damage == "missing":
        del tensors[name.replace("row_index", "u")]
    elif damage == "rank":
        config = json.loads((tmp_path / "config.json").read_text())
        for entry in config["quantization_config"]["layers"].values():
            entry["low_rank"]["rank"] = 10_000
        (tmp_path / "config.json").write_text(json.dumps(config))
    else:
        tensors[name][0, 0] = 10**6 if damage == "outside" else tensors[name][0, 1]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    messages = {"missing": "lacks", "rank": "rank 10000 is not between"}
    with pytest.raises(ValueError, match=messages.get(damage, "names rows that the matrices")):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_schedule_is_cubic():
    def share(step):
        return kept_share(step, 100, 0.1, warm_up=20, cool_down=30)

    assert [share(step) for step in (0, 20)] == [1, 1]
    assert share(45) == pytest.approx(0.1 + 0.9 * 0.5**3)
    assert [share(step) for step in (70, 100)] == [0.1, 0.1]
    assert all(share(step) >= share(step + 1) for step in range(100))
    with pytest.raises(ValueError, match="leave nothing of 100 steps"):
        kept_share(1, 100, 0.1, warm_up=50, cool_down=50)
    with pytest.raises(ValueError, match=r"final=-0.1 is not a share"):
        kept_share(1, 100, -0.1, warm_up=1, cool_down=1)


def test_rows_go_by_importance_and_exactly_on_schedule(tmp_path):
    model, inputs, _ = fresh_case("qwen3_moe")
    for layer in expert_layers(model):
        factorise_layer(layer, 2, 1.0)
    pruner = RowPruner(model, RowPruning(final=0.25, total=20, warm_up=2, cool_down=4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    told = TrainingArguments(str(tmp_path)), (state := TrainerState()), TrainerControl()
    for step in range(1, 21):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        pruner.on_pre_optimizer_step(*told)
        optimizer.step()
        optimizer.zero_grad()
        state.global_step = step
        pruner.on_step_end(*told)
        for made in pruner.maps:
            alive = (made.rows != 0).any(-1).sum(1)
            assert (alive == round(pruner.pruning.share(step) * made.rows.shape[1])).all()
    first, smoothed = pruner.maps[0], pruner.importance[0]
    best = smoothed[0].argsort(descending=True, stable=True)[: round(0.25 * first.rows.shape[1])]
    dense = [made.dense(0) for made in pruner.maps]
    pruner.finish()
    assert first.row_index[0].tolist() == sorted(best.tolist())
    for made, before in zip(pruner.maps, dense, strict=True):
        torch.testing.assert_close(made.dense(0), before)
    assert first.rows.shape[1] == len(best)


def test_nothing_to_prune():
    model, _, _ = fresh_case("qwen3_moe")
    factorise_layer(expert_layers(model)[0], 2, 0.0)
    with pytest.raises(ValueError, match="no rows of S to prune"):
        RowPruner(model, RowPruning(final=0.25, total=20, warm_up=2, cool_down=4))
