import copy
import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from moekit.moe.statistics import LayerStatistics, RoutingStatistics
from safetensors import safe_open
from safetensors.torch import load_file, save_file

E, D, K = 6, 5, 2
SUMS = (
    "counts",
    "routing_weight_sums",
    "logit_gram",
    "coactivation",
    "output_norm_sums",
    "output_square_sums",
    "gated_output_norm_sums",
)


def record_by_loop(logits_TE, outputs_TED, top_k=K):
    """The definition of every entry, token by token."""
    stats = LayerStatistics.zeros(logits_TE.shape[1], outputs_TED.shape[2], top_k)
    for logits_E, outputs_ED in zip(logits_TE, outputs_TED, strict=True):
        probabilities = torch.softmax(logits_E, dim=0)
        stats.num_tokens += 1
        stats.router_entropy_sum += -float((probabilities * probabilities.log()).sum())
        stats.logit_gram += torch.outer(logits_E, logits_E)
        chosen = logits_E.topk(top_k).indices.tolist()
        for e in chosen:
            norm = outputs_ED[e].norm()
            stats.counts[e] += 1
            stats.routing_weight_sums[e] += probabilities[e]
            stats.output_norm_sums[e] += norm
            stats.gated_output_norm_sums[e] += probabilities[e] * norm
            stats.output_square_sums[e] += norm**2
            stats.output_sums[e] += outputs_ED[e]
            stats.max_output_norm[e] = torch.maximum(stats.max_output_norm[e], norm)
            for other in chosen:
                stats.coactivation[e, other] += 1
    return stats


def random_tokens(num_tokens, seed=0, num_experts=E):
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64)
    return logits_TE, torch.randn(num_tokens, num_experts, D, generator=generator, dtype=torch.float64)


def random_statistics(seed=0, layers=("model.layers.0.mlp", "model.layers.2.mlp"), **fingerprint):
    return RoutingStatistics(
        layers={name: record_by_loop(*random_tokens(20, seed + i)) for i, name in enumerate(layers)},
        fingerprint=fingerprint,
    )


def assert_equal(a, b, exact=True):
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-12, "atol": 1e-12}
    assert list(a.layers) == list(b.layers)
    for name, layer in a.layers.items():
        torch.testing.assert_close(vars(layer), vars(b.layers[name]), **tolerance)


def layer_with(**entries):
    stats = LayerStatistics.zeros(4, D, 1)
    for name, value in entries.items():
        setattr(
            stats,
            name,
            torch.tensor(value, dtype=getattr(stats, name).dtype) if isinstance(value, list) else value,
        )
    return stats


def test_the_parts_add_up_to_the_whole_however_they_are_split():
    logits_TE, outputs_TED = random_tokens(40)
    whole = RoutingStatistics(layers={"mlp": record_by_loop(logits_TE, outputs_TED)})
    for cuts in ([1, 39], [13, 13, 14], [5] * 8):
        shards = zip(logits_TE.split(cuts), outputs_TED.split(cuts), strict=True)
        parts = [RoutingStatistics(layers={"mlp": record_by_loop(*shard)}) for shard in shards]
        assert_equal(sum(parts, RoutingStatistics()), whole, exact=False)
        assert_equal(sum(reversed(parts), RoutingStatistics()), whole, exact=False)


def test_adding_leaves_both_operands_alone_and_takes_the_larger_maximum():
    a, b = random_statistics(0), random_statistics(7)
    before = copy.deepcopy(a)
    total = a + b
    assert_equal(a, before)
    for name, layer in total.layers.items():
        assert torch.equal(
            layer.max_output_norm,
            torch.maximum(a.layers[name].max_output_norm, b.layers[name].max_output_norm),
        )
        for entry in SUMS:
            expected = getattr(a.layers[name], entry) + getattr(b.layers[name], entry)
            assert torch.equal(getattr(layer, entry), expected)


def test_no_layers_and_no_tokens_are_both_neutral():
    stats = random_statistics(model="m")
    assert_equal(RoutingStatistics() + stats, stats)
    assert_equal(stats + RoutingStatistics(), stats)
    zeros = RoutingStatistics(layers={name: LayerStatistics.zeros(E, D, K) for name in stats.layers})
    assert_equal(stats + zeros, stats)
    assert (RoutingStatistics() + stats).fingerprint == {"model": "m"}


@pytest.mark.parametrize("size", [(E + 1, D, K), (E, D + 1, K), (E, D, K + 1)])
def test_other_shapes_are_refused_with_the_layer_and_both_shapes(size):
    a = RoutingStatistics(layers={"model.layers.3.mlp": LayerStatistics.zeros(E, D, K)})
    b = RoutingStatistics(layers={"model.layers.3.mlp": LayerStatistics.zeros(*size)})
    shapes = [f"{e} experts, hidden size {d}, top_k={k}" for e, d, k in ((E, D, K), size)]
    with pytest.raises(ValueError, match=r"layer 'model\.layers\.3\.mlp'.*" + ".*".join(shapes)):
        a + b


def test_other_models_are_refused():
    with pytest.raises(ValueError, match=r"only one of them has layer 'model\.layers\.1\.mlp'"):
        random_statistics() + random_statistics(layers=("model.layers.0.mlp", "model.layers.1.mlp"))
    with pytest.raises(ValueError, match="model is 'a' and 'b'"):
        random_statistics(model="a") + random_statistics(model="b")


def test_data_fingerprints_join_whatever_the_order():
    a, b, c = (random_statistics(data=data, model="m") for data in "abc")
    assert ((c + a) + b).fingerprint == (a + (b + c)).fingerprint == {"data": "a+b+c", "model": "m"}


def test_statistics_of_an_impossible_layer_are_refused():
    with pytest.raises(ValueError, match="top_k=7 is not between 1 and 6 experts"):
        LayerStatistics.zeros(E, D, E + 1)
    with pytest.raises(ValueError, match="num_experts=0"):
        LayerStatistics.zeros(0, D, 1)


def test_usage_is_a_distribution_and_load_entropy_its_flatness():
    stats = record_by_loop(*random_tokens(40))
    assert float(stats.usage.sum()) == pytest.approx(1, abs=1e-12)
    assert 0 < stats.load_entropy < 1
    equal = layer_with(num_tokens=20, counts=[5, 5, 5, 5])
    assert equal.load_entropy == pytest.approx(1, abs=1e-12)
    assert equal.usage.tolist() == [0.25] * 4
    half = layer_with(num_tokens=8, counts=[4, 4, 0, 0])
    assert half.load_entropy == pytest.approx(0.5, abs=1e-12)
    assert layer_with(num_tokens=8, counts=[0, 8, 0, 0]).load_entropy == 0


def test_means_by_hand():
    stats = layer_with(
        num_tokens=4,
        counts=[1, 3, 0, 0],
        routing_weight_sums=[0.5, 2.4, 0, 0],
        output_sums=[[2.0] * D, [6.0] * D, [0.0] * D, [0.0] * D],
        router_entropy_sum=2.0,
    )
    torch.testing.assert_close(stats.mean_routing_weight, torch.tensor([0.5, 0.8, 0, 0], dtype=torch.float64))
    assert stats.mean_output[:, 0].tolist() == [2, 2, 0, 0]
    assert stats.entropy == 0.5


def test_dead_and_thinly_covered_experts():
    stats = layer_with(num_tokens=43, counts=[0, 32, 1, 10])
    assert stats.dead == [0]
    assert stats.too_few(10) == [0, 2]
    assert stats.too_few(33) == [0, 1, 2, 3]
    assert RoutingStatistics(layers={"mlp": stats}).coverage(32) == {"mlp": [0, 2, 3]}


def test_before_any_token_everything_is_finite():
    stats = LayerStatistics.zeros(E, D, K)
    for value in (stats.usage, stats.mean_routing_weight, stats.mean_output):
        assert torch.equal(value, torch.zeros_like(value))
    assert torch.equal(stats.logit_cosine, torch.eye(E, dtype=torch.float64))
    assert (stats.entropy, stats.load_entropy) == (0, 0)
    assert stats.dead == list(range(E))
    assert LayerStatistics.zeros(1, D, 1).load_entropy == 1


def test_logit_cosine_is_the_cosine_of_the_logits_over_tokens():
    logits_TE, outputs_TED = random_tokens(40)
    logits_TE[:, 3] = -2 * logits_TE[:, 1]
    stats = record_by_loop(logits_TE, outputs_TED)
    expected = torch.nn.functional.cosine_similarity(logits_TE.T[:, None], logits_TE.T[None], dim=-1)
    torch.testing.assert_close(stats.logit_cosine, expected)
    assert float(stats.logit_cosine[1, 3]) == pytest.approx(-1)
    assert stats.logit_cosine.abs().max() <= 1


def test_a_silent_expert_is_similar_to_itself_alone():
    stats = layer_with(num_tokens=2, logit_gram=[[4, 2, 0, 0], [2, 1, 0, 0], [0] * 4, [0] * 4])
    assert stats.logit_cosine.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_deviation_of_what_an_expert_says():
    logits_TE, outputs_TED = random_tokens(40)
    chosen_TE = torch.zeros_like(logits_TE).scatter(1, logits_TE.topk(K).indices, 1.0).bool()
    stats = record_by_loop(logits_TE, outputs_TED)
    for expert in range(E):
        said_TD = outputs_TED[chosen_TE[:, expert], expert]
        expected = said_TD.var(0, correction=1).sum().sqrt() if len(said_TD) > 1 else torch.zeros(())
        torch.testing.assert_close(stats.output_deviation[expert], expected.double())
    one = record_by_loop(logits_TE[:1], outputs_TED[:1])
    assert one.output_deviation.tolist() == [0.0] * E


@pytest.mark.parametrize("target", ["", "deep/er", "mine.safetensors"])
def test_save_and_load_are_exact(tmp_path, target):
    stats = random_statistics(model="tiny", data="0badcafe")
    stats.layers["model.layers.2.mlp"].router_entropy_sum = math.pi
    file = stats.save(tmp_path / target)
    read = RoutingStatistics.load(tmp_path / target)
    assert_equal(read, stats)
    assert read.fingerprint == {"model": "tiny", "data": "0badcafe"}
    assert list(file.parent.iterdir()) == [file]
    assert file.suffix == ".safetensors"


def test_layers_keep_their_forward_order(tmp_path):
    names = ("layers.10.mlp", "layers.2.mlp", "layers.1.mlp")
    random_statistics(layers=names).save(tmp_path)
    assert tuple(RoutingStatistics.load(tmp_path).layers) == names


def test_a_failed_save_keeps_the_old_file_and_leaves_nothing_else(tmp_path, monkeypatch):
    stats = random_statistics()
    file = stats.save(tmp_path)
    before = file.read_bytes()

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moekit.moe.statistics_file.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        (stats + stats).save(tmp_path)
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("output_sums", float("nan"), "output_sums holds NaN or infinity"),
        ("logit_gram", float("inf"), "logit_gram holds NaN or infinity"),
        ("counts", -1, "counts holds a negative number"),
        ("max_output_norm", -0.5, "max_output_norm holds a negative number"),
    ],
)
def test_broken_numbers_are_neither_written_nor_read(tmp_path, entry, value, message):
    stats = random_statistics()
    file = stats.save(tmp_path / "good")
    getattr(stats.layers["model.layers.2.mlp"], entry)[1] = value
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp.*" + message):
        stats.save(tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
    rewrite(file, lambda tensors, header: tensors[f"model.layers.2.mlp.{entry}"][1].fill_(value))
    with pytest.raises(ValueError, match=message):
        RoutingStatistics.load(file)


def rewrite(file, change, **metadata):
    """Edits a saved file as a careless tool would."""
    with safe_open(file, framework="pt") as opened:
        old = opened.metadata()
    tensors, header = load_file(file), json.loads(old["statistics"])
    change(tensors, header)
    save_file(tensors, file, {**old, "statistics": json.dumps(header), **metadata})


def replace_tensor(key, convert):
    def change(tensors, header):
        tensors[f"model.layers.0.mlp.{key}"] = convert(tensors[f"model.layers.0.mlp.{key}"])

    return change


@pytest.mark.parametrize(
    ("change", "metadata", "message"),
    [
        (lambda t, h: t.pop("model.layers.0.mlp.counts"), {}, "model.layers.0.mlp': counts is missing"),
        (lambda t, h: t.update(stray=torch.zeros(1)), {}, "unknown tensor 'stray'"),
        (lambda t, h: h["layers"].pop(), {}, "unknown tensor 'model.layers.2.mlp"),
        (lambda t, h: h["layers"][0].pop("top_k"), {}, "top_k is missing"),
        (lambda t, h: h["layers"][0].update(num_tokens=-3), {}, "num_tokens=-3"),
        (lambda t, h: h["layers"][0].update(num_tokens=2.5), {}, "num_tokens=2.5"),
        (lambda t, h: h["layers"][0].update(router_entropy_sum=float("nan")), {}, "router_entropy_sum=nan"),
        (lambda t, h: h.update(layers=None), {}, "lists no layers"),
        (lambda t, h: h.update(fingerprint={"data": 3}), {}, "not a table of strings"),
        (lambda t, h: None, {"version": "1"}, "version is '1', this moekit reads 2"),
        (lambda t, h: None, {"format": "pt"}, "format is 'pt'"),
        (lambda t, h: None, {"statistics": "{"}, "Expecting property name"),
        (
            replace_tensor("counts", torch.Tensor.double),
            {},
            r"counts is torch.float64 \[6\], not torch.int64",
        ),
        (replace_tensor("logit_gram", lambda t: t[:2].clone()), {}, r"logit_gram is torch.float64 \[2, 6\]"),
        (
            replace_tensor("output_sums", torch.Tensor.flatten),
            {},
            r"output_sums has shape \[30\], not \[E, D\]",
        ),
    ],
)
def test_a_file_that_is_not_whole_is_refused(tmp_path, change, metadata, message):
    file = random_statistics().save(tmp_path)
    rewrite(file, change, **metadata)
    with pytest.raises(ValueError, match=message) as error:
        RoutingStatistics.load(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("keep", [0, 4, 100, -8])
def test_a_truncated_file_is_refused(tmp_path, keep):
    file = random_statistics().save(tmp_path)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="not a whole file of routing statistics"):
        RoutingStatistics.load(file)


def test_a_foreign_or_missing_file_is_refused(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="format is 'None'"):
        RoutingStatistics.load(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"no routing statistics at .*routing_statistics\.safetensors"):
        RoutingStatistics.load(tmp_path)


def test_all_reduce_gives_every_process_the_sum():
    # Two gloo ranks in two threads: the same backend as between processes, without their start-up time.
    store = dist.HashStore()
    parts = [random_statistics(0), random_statistics(9)]
    before = copy.deepcopy(parts)

    def rank(index):
        group = dist.ProcessGroup(store, index, 2)
        backend = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), index, 2)
        group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
        return parts[index].all_reduce(group)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(rank, range(2), timeout=60))
    for result, part, untouched in zip(results, parts, before, strict=True):
        assert_equal(result, before[0] + before[1])
        assert_equal(part, untouched)
