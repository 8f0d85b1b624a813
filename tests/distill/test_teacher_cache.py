"""A cache gives back what was said, goes on after a kill, and believes no file that it did not check."""

import copy
import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from moekit.distill import teacher_cache
from moekit.distill.fused import Head
from moekit.distill.losses import cached_top_k_kl, top_k_kl
from moekit.distill.teacher_cache import CachedRows, CacheSpec, TeacherCache, build_cache
from moekit.distill.teacher_cache_format import (
    MAX_SHARD_BYTES,
    MAX_SHARD_EXAMPLES,
    checksum,
    examples_per_shard,
)
from torch.utils.data import DataLoader

from .teacher_caches import (
    EVERY_KIND,
    HEAD,
    HEADS,
    SOURCE,
    SPECS,
    Teacher,
    build,
    contents,
    meet_nobody,
    metadata,
    same,
    say,
)


@EVERY_KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_was_said_comes_back(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    build(tmp_path, kind, Teacher(kind, dtype=dtype))
    cache = TeacherCache.open(tmp_path, SPECS[kind])
    for examples in (list(range(11)), [7, 2, 10, 2, 0, 7, 7], [4, 8], []):
        same(cache.read(torch.tensor(examples, dtype=torch.int64)), say(kind, examples, dtype))
    parts = [path for path in tmp_path.iterdir() if path.suffix == ".safetensors"]
    assert cache.num_bytes == sum(path.stat().st_size for path in parts)


@EVERY_KIND
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_floats_are_stored_as_asked(kind: str, dtype: str, tmp_path: Path) -> None:
    spec = replace(SPECS[kind], dtype=dtype)
    build_cache(tmp_path, spec, Teacher(kind, dtype=torch.float64), head=HEADS[kind])
    read = TeacherCache.open(tmp_path, spec).read(torch.arange(11))
    said = say(kind, range(11), torch.float64)
    stored = {
        name: t.to(getattr(torch, dtype)) if t.is_floating_point() else t for name, t in said.tensors.items()
    }
    same(read, CachedRows(said.num_rows, stored))


@pytest.mark.parametrize("head", [HEAD, Head(weight=torch.randn(5, 2))])
def test_the_head_comes_back(head: Head, tmp_path: Path) -> None:
    build_cache(tmp_path, SPECS["hidden"], Teacher("hidden"), head=head)
    found = TeacherCache.open(tmp_path, SPECS["hidden"]).head
    assert found is not None
    assert found.weight.dtype == head.weight.dtype
    assert torch.equal(found.weight, head.weight)
    assert (found.bias is None) == (head.bias is None)
    assert found.bias is None or torch.equal(found.bias, HEAD.bias)
    assert (found.softcap, found.scale, found.num_columns) == (head.softcap, head.scale, head.num_columns)


def test_the_loss_of_cached_tokens_is_that_of_the_logits(tmp_path: Path) -> None:
    build(tmp_path, "top-k")
    rows = TeacherCache.open(tmp_path, SPECS["top-k"]).read(torch.tensor([5, 3])).tensors
    student, teacher = torch.randn(4, 9), say("logits", [5, 3]).tensors["logits"]
    cached = cached_top_k_kl(student, rows["log_probs"], rows["ids"])
    torch.testing.assert_close(cached, top_k_kl(student, teacher, k=4))


@EVERY_KIND
def test_a_killed_build_goes_on(kind: str, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    build(whole, kind)
    with pytest.raises(KeyboardInterrupt):
        build(killed, kind, Teacher(kind, dies_at=6))
    partial = killed / ".shard-00002.safetensors.x1_y.partial"
    partial.mkdir()
    (partial / ".tmpA1b2").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"lacks 2 of 4 shards.*shard-00002.*same command again"):
        TeacherCache.open(killed, SPECS[kind])
    teacher, there = Teacher(kind), []
    build(killed, kind, teacher, progress=there.append)
    assert teacher.asked == [6, 9]
    assert there == [3, 3, 3, 2]
    assert contents(killed) == contents(whole)
    build(killed, kind, teacher)
    assert teacher.asked == [6, 9]


def test_a_damaged_shard_is_made_again(tmp_path: Path) -> None:
    build(tmp_path, "logits")
    before = contents(tmp_path)
    shard = tmp_path / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors' is no whole part.*same command again"):
        TeacherCache.open(tmp_path, SPECS["logits"])
    teacher = Teacher("logits")
    build(tmp_path, "logits", teacher)
    assert teacher.asked == [3]
    assert contents(tmp_path) == before


@EVERY_KIND
def test_two_processes_make_one_cache(kind: str, tmp_path: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    build(alone, kind)
    teachers = [Teacher(kind), Teacher(kind)]
    group: dict[str, Any] = {"num_processes": 2, "barrier": Barrier(2, timeout=60).wait}
    with ThreadPoolExecutor() as pool:
        second = pool.submit(build, together, kind, teachers[1], process_index=1, **group)
        build(together, kind, teachers[0], process_index=0, **group)
        second.result()
    assert [teacher.asked for teacher in teachers] == [[0, 6], [3, 9]]
    assert contents(together) == contents(alone)


def test_processes_need_one_folder_and_a_barrier(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"process 0 has written .*index\.json', which this process does not"
    ):
        build(tmp_path, "logits", process_index=1, num_processes=2, wait_seconds=0.01)
    with pytest.raises(ValueError, match="num_processes=2 needs a barrier"):
        build(tmp_path, "logits", num_processes=2, barrier=None)
    assert contents(tmp_path) == {}


def test_a_shard_is_bounded() -> None:
    assert examples_per_shard(1) == MAX_SHARD_EXAMPLES
    assert examples_per_shard(MAX_SHARD_BYTES) == examples_per_shard(MAX_SHARD_BYTES * 9) == 1
    assert examples_per_shard(MAX_SHARD_BYTES // 3) == 3
    spec = replace(SPECS["logits"], shard_examples=examples_per_shard(MAX_SHARD_BYTES // 5))
    assert spec.record["shard_examples"] == 5


@pytest.mark.parametrize("max_open", [1, 512])
def test_workers_and_copies_read_too(max_open: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_cache, "MAX_OPEN_SHARDS", max_open)
    build(tmp_path, "hidden")
    cache = TeacherCache.open(tmp_path, SPECS["hidden"])
    expected = say("hidden", range(11))
    same(cache.read(torch.arange(11)), expected)
    same(copy.deepcopy(cache).read(torch.arange(11)), expected)
    loader = DataLoader(
        list(range(11)),
        batch_size=4,
        num_workers=2,
        multiprocessing_context="fork",
        collate_fn=lambda examples: cache.read(torch.tensor(examples)).tensors["hidden"],
    )
    assert torch.equal(torch.cat(list(loader)), expected.tensors["hidden"])


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux for the memory in use")
def test_only_the_rows_asked_for_are_kept(tmp_path: Path) -> None:
    spec = CacheSpec(kind="logits", num_examples=2, source={})
    said = CachedRows(torch.tensor([1, 1]), {"logits": torch.ones(2, 1)})
    build_cache(tmp_path, spec, lambda examples: said)
    rows, width = 2**16, 2**9  # 128 megabytes, of which the disk holds nothing
    size = rows * width * 4
    offsets, value = torch.tensor([0, rows - 2, rows]), 0
    for _ in range(size // 2**20):
        value = zlib.crc32(bytes(2**20), value)
    known = metadata(tmp_path / "shard-00000.safetensors")
    facts = json.loads(known["teacher_cache"])
    assert facts["checksum"] == checksum({"offsets": torch.tensor([0, 1, 2]), "logits": torch.ones(2, 1)})
    facts["checksum"] = zlib.crc32(offsets.numpy().tobytes(), value)
    header = {
        "__metadata__": {"teacher_cache": json.dumps(facts)},
        "offsets": {"dtype": "I64", "shape": [3], "data_offsets": [0, 24]},
        "logits": {"dtype": "F32", "shape": [rows, width], "data_offsets": [24, 24 + size]},
    }
    with (tmp_path / "shard-00000.safetensors").open("wb") as file:
        text = json.dumps(header).encode()
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(offsets.numpy().tobytes())
        file.truncate(8 + len(text) + 24 + size)
    before = resident_bytes()
    read = TeacherCache.open(tmp_path, spec).read(torch.tensor([1])).tensors["logits"]
    assert read.shape == (2, width)
    assert read.untyped_storage().nbytes() == 2 * width * 4
    assert resident_bytes() - before < size / 8


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"kind": "states"}, "kind='states' is not one of hidden, top-k, logits"),
        ({"dtype": "int8"}, "dtype='int8' is not one of"),
        ({"num_examples": 0}, "num_examples=0 is not a whole number"),
        ({"shard_examples": True}, "shard_examples=True is not"),
        ({"kind": "top-k"}, "top_k=None is not"),
        ({"kind": "top-k", "top_k": 0}, "top_k=0 is not"),
        ({"top_k": 4}, "top_k=4 needs kind='top-k'"),
    ],
)
def test_specs_that_cannot_be_are_refused(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CacheSpec(**({"kind": "hidden", "num_examples": 5, "source": SOURCE} | entries))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"source": SOURCE | {"model": "d"}},
            "for: 'source model' is 'aaa.*' there, 'd' here; choose",
        ),
        ({"source": SOURCE | {"tokenizer": "d"}}, "asked for: 'source tokenizer' is 'bbb.*' there"),
        ({"source": SOURCE | {"seed": "1"}}, "asked for: 'source seed' is None there, '1' here"),
        ({"source": {"model": "d"}}, "'source data' is .*; 'source model' is .*; 'source tokenizer' is"),
        ({"kind": "hidden", "top_k": None}, "'kind' is 'top-k' there, 'hidden' here; 'top_k' is 4 there"),
        ({"num_examples": 12}, "'num_examples' is 11 there, 12 here"),
        ({"dtype": "bfloat16"}, "'dtype' is 'auto' there"),
        ({"shard_examples": 4}, "'shard_examples' is 3 there"),
    ],
)
def test_another_cache_is_neither_read_nor_overwritten(
    entries: dict[str, Any], message: str, tmp_path: Path
) -> None:
    build(tmp_path, "top-k")
    before = contents(tmp_path)
    spec = replace(SPECS["top-k"], **entries)
    with pytest.raises(ValueError, match=message):
        TeacherCache.open(tmp_path, spec)
    for process in (0, 1):
        with pytest.raises(ValueError, match=message):
            build_cache(
                tmp_path,
                spec,
                Teacher(spec.kind),
                head=HEADS[spec.kind],
                process_index=process,
                num_processes=2,
                barrier=meet_nobody,
            )
    assert contents(tmp_path) == before


def test_folders_of_other_things_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no teacher cache in .*; build it first"):
        TeacherCache.open(tmp_path / "none", SPECS["logits"])
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(ValueError, match=r"holds 'notes.txt', which is no file of a teacher cache"):
        build(tmp_path, "logits")
    assert contents(tmp_path) == {"notes.txt": b"mine"}
    with pytest.raises(ValueError, match="is a file"):
        build(notes, "logits")
    build(tmp_path / "cache", "logits")
    (tmp_path / "cache" / "index.json").unlink()
    with pytest.raises(ValueError, match=r"holds shard-00000\.safetensors and no index\.json"):
        build(tmp_path / "cache", "logits")


@pytest.mark.parametrize(
    "head",
    [
        replace(HEAD, bias=None),
        replace(HEAD, scale=1.0),
        replace(HEAD, num_columns=None),
        replace(HEAD, weight=HEAD.weight + 1),
        HEAD.cast(torch.float32),
    ],
)
def test_another_head_is_refused(head: Head, tmp_path: Path) -> None:
    build(tmp_path, "hidden")
    with pytest.raises(ValueError, match="holds a head"):
        build_cache(tmp_path, SPECS["hidden"], Teacher("hidden"), head=head)


def test_a_head_goes_with_hidden_states_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kind='hidden' needs a head"):
        build_cache(tmp_path, SPECS["hidden"], Teacher("hidden"))
    with pytest.raises(ValueError, match="kind='logits' needs no head"):
        build_cache(tmp_path, SPECS["logits"], Teacher("logits"), head=HEAD)
    with pytest.raises(ValueError, match="process_index=2"):
        build(tmp_path, "logits", process_index=2, num_processes=2)
    broken = replace(HEAD, weight=HEAD.weight.clone().index_fill_(0, torch.tensor(3), float("nan")))
    with pytest.raises(ValueError, match="weight of the teacher's head holds NaN"):
        build_cache(tmp_path, SPECS["hidden"], Teacher("hidden"), head=broken)


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [
        ("hidden", "hidden", float("nan"), r"NaN or infinity of example 7 \(hidden\)"),
        ("logits", "logits", float("inf"), r"NaN or infinity of example 7 \(logits\)"),
        ("top-k", "log_probs", float("-inf"), r"NaN or infinity of example 7 \(log_probs\)"),
        ("top-k", "ids", -1, r"an id that no token can have of example 7 \(ids\)"),
    ],
)
def test_nonsense_is_not_stored(kind: str, name: str, value: float, message: str, tmp_path: Path) -> None:
    def teacher(examples: range) -> CachedRows:
        said = say(kind, examples)
        if 7 in examples:  # examples 6, 7 and 8 have 2, 3 and no rows
            said.tensors[name][4, 0] = value
        return said

    with pytest.raises(ValueError, match=message):
        build(tmp_path, kind, teacher)
    shards = sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("shard"))
    assert shards == ["shard-00000.safetensors", "shard-00001.safetensors"]


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("hidden", lambda n, t: (n, {"hidden": t["hidden"][:-1]}), r"hidden of shape \(2, 2\), not \[3, 2\]"),
        ("hidden", lambda n, t: (n, {"hidden": t["hidden"][:, :1]}), r"shape \(3, 1\), not \[3, 2\]"),
        ("hidden", lambda n, t: (n, {"logits": t["hidden"]}), r"\['logits'\]; kind='hidden' needs"),
        ("hidden", lambda n, t: (n[:-1], t), "not one count for each of 3"),
        ("logits", lambda n, t: (n, {"logits": t["logits"].long()}), "logits of type torch.int64"),
        ("logits", lambda n, t: (n - 1, t), "not one count for each of 3"),
        ("top-k", lambda n, t: (n, {name: x[:, :3] for name, x in t.items()}), r"not \[3, 4\]"),
        ("top-k", lambda n, t: (n, t | {"ids": t["ids"].float()}), "ids of type torch.float32"),
    ],
)
def test_answers_of_another_form_are_refused(kind: str, change, message: str, tmp_path: Path) -> None:
    def teacher(examples: range) -> CachedRows:
        said = say(kind, examples)
        return CachedRows(*change(said.num_rows, said.tensors))

    with pytest.raises(ValueError, match=f"of examples 0 to 2 the teacher gave .*{message}"):
        build(tmp_path, kind, teacher)


def test_a_teacher_that_changes_its_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, "logits", Teacher("logits", dies_at=6))
    other = Teacher("logits", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"float32.* before shard-00002.*bfloat16.*load it as before"):
        build(tmp_path, "logits", other)
    build(tmp_path, "logits", other, process_index=2, num_processes=4)
    build(tmp_path, "logits", process_index=3, num_processes=4)
    with pytest.raises(ValueError, match=r"shard-00002.*bfloat16.*two teachers made them"):
        TeacherCache.open(tmp_path, SPECS["logits"])


@pytest.mark.parametrize("example", [-1, 11, 2**62])
def test_examples_that_are_not_there_are_refused(example: int, tmp_path: Path) -> None:
    build(tmp_path, "logits")
    with pytest.raises(ValueError, match=f"example {example} is not in the .*, which holds 0 to 10"):
        TeacherCache.open(tmp_path, SPECS["logits"]).read(torch.tensor([3, example]))
