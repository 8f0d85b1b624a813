"""A cache believes no file that it did not check, and reads none outside its folder."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from moekit.distill.teacher_cache import TeacherCache, build_cache
from moekit.distill.teacher_cache_format import checksum
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .teacher_caches import SPECS, Teacher, build, contents, metadata, same, say


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole cache of each kind."""
    folder = tmp_path_factory.mktemp("built")
    for kind in SPECS:
        build(folder / kind, kind)
    return folder


@pytest.fixture
def folders(built: Path, tmp_path: Path) -> Path:
    """Copies of them, to be damaged."""
    return shutil.copytree(built, tmp_path / "copies")


def test_links_are_not_followed(built: Path, folders: Path) -> None:
    folder = folders / "logits"
    for name in ("index.json", "shard-00001.safetensors"):
        link = folder / name
        link.unlink()
        link.symlink_to(built / "logits" / name)
        with pytest.raises(ValueError, match="nothing outside the folder is read"):
            TeacherCache.open(folder, SPECS["logits"])
        with pytest.raises(ValueError, match=f"holds '{name}', which is no file"):
            build(folder, "logits")
        link.unlink()
        shutil.copy(built / "logits" / name, link)


BEGINNING = b'{"format": "moekit.teacher-cache", "version": '


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "Expecting value"),
        (b"\xff\xfe\x00", "decode"),
        (b"[]", "not of the format"),
        (b"[" * 100_000, "nested too deeply"),
        (b" " * 2**21, "more than 1048576 bytes"),
        (BEGINNING + b"1}", "its version is 1; this moekit reads 2"),
        (BEGINNING + b"true}", "its version is True"),
        (BEGINNING + b"1" * 9999 + b"}", "cannot be used"),
        (BEGINNING + b'2, "spec": []}', "no spec with a source"),
        (BEGINNING + b'2, "spec": {"source": "x"}}', "no spec with a source"),
        (
            BEGINNING + b'2, "spec": {"source": {"../model": [1e999]}}}',
            r"'source \.\./model' is \[inf\] there, None here",
        ),
        (
            BEGINNING + b'2, "spec": {"num_examples": 1e30, "source": {}}}',
            r"'num_examples' is 1e\+30 there, 11",
        ),
    ],
)
def test_a_damaged_index_is_refused(text: bytes, message: str, folders: Path) -> None:
    folder = folders / "logits"
    (folder / "index.json").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        TeacherCache.open(folder, SPECS["logits"])
    with pytest.raises(ValueError, match=message):
        build(folder, "logits")


def damage(file: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> None:
    """Change what a file holds, checksum included, so that only its meaning is wrong."""
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    known = metadata(file)
    change(tensors, known)
    if known:
        known["teacher_cache"] = json.dumps(
            json.loads(known["teacher_cache"]) | {"checksum": checksum(tensors)}
        )
    save_file(tensors, file, known)


def put(**entries: Tensor) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    return lambda tensors, known: tensors.update(entries)


LARGE = 2**63 - 1


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("logits", put(offsets=torch.tensor([0, 2, 1, 3])), "do not rise from 0"),
        ("logits", put(offsets=torch.tensor([0, LARGE, -LARGE - 1, -1])), "do not rise from 0"),
        ("logits", put(offsets=torch.tensor([1, 1, 2, 3])), "do not rise from 0"),
        ("logits", put(offsets=torch.tensor([0, 0, 1, 4])), "its offsets need 4 rows"),
        ("logits", put(offsets=torch.tensor([0, 1, 3])), "its offsets are no 4 numbers"),
        ("logits", put(offsets=torch.tensor([0.0, 0, 1, 3])), "its offsets are no 4 numbers"),
        ("logits", put(more=torch.ones(1)), r"it holds \['logits', 'more', 'offsets'\]"),
        ("logits", put(logits=torch.ones(3)), r"its logits have shape \[3\]"),
        ("logits", put(logits=torch.ones(3, 9, dtype=torch.int32)), "its logits are I32, not F16 or BF16"),
        ("logits", put(logits=torch.ones(3, 8)), "two teachers made them"),
        ("logits", lambda tensors, known: known.clear(), "does not say to which cache"),
        ("top-k", put(ids=torch.ones(3, 4, dtype=torch.int64)), "its ids are I64, not I32"),
        ("top-k", put(ids=torch.ones(3, 3, dtype=torch.int32)), "its ids have 3 columns, not top_k=4"),
        ("top-k", put(log_probs=torch.ones(2, 4)), "its offsets need 3 rows"),
    ],
)
def test_a_shard_that_contradicts_itself_is_refused(kind: str, change, message: str, folders: Path) -> None:
    folder = folders / kind
    damage(folder / "shard-00000.safetensors", change)
    with pytest.raises(ValueError, match=message):
        TeacherCache.open(folder, SPECS[kind])


def flip(file: Path) -> None:
    """Change a bit in the middle of the last tensor."""
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("kind", SPECS)
def test_rows_that_are_not_those_written_are_refused(kind: str, folders: Path) -> None:
    folder, examples = folders / kind, torch.tensor([5])
    before = contents(folder)
    flip(folder / "shard-00001.safetensors")
    cache = TeacherCache.open(folder, SPECS[kind])
    cache.read(torch.tensor([2, 6]))
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"shard-00001\..*its checksum is wrong.*; remove it and give the same"
        ):
            cache.read(examples)
    teacher = Teacher(kind)
    build(folder, kind, teacher)
    assert teacher.asked == [3]
    assert contents(folder) == before
    same(TeacherCache.open(folder, SPECS[kind]).read(examples), say(kind, [5]))


def test_a_head_that_is_not_the_one_written_is_refused(folders: Path) -> None:
    folder = folders / "hidden"
    before = contents(folder)
    flip(folder / "head.safetensors")
    with pytest.raises(ValueError, match=r"head\.safetensors.*its checksum is wrong"):
        TeacherCache.open(folder, SPECS["hidden"])
    build(folder, "hidden")
    assert contents(folder) == before


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}"])
@pytest.mark.parametrize("name", ["head", "shard-00003"])
def test_files_of_noise_are_refused(name: str, content: bytes, folders: Path) -> None:
    folder = folders / "hidden"
    before = contents(folder)
    (folder / f"{name}.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*is no whole part of a teacher cache"):
        TeacherCache.open(folder, SPECS["hidden"])
    build(folder, "hidden")
    assert contents(folder) == before


def test_shards_of_another_place_or_cache_are_refused(folders: Path) -> None:
    build_cache(folders / "other", replace(SPECS["logits"], source={}), Teacher("logits"))
    for source in ("logits/shard-00002.safetensors", "other/shard-00001.safetensors"):
        shutil.copy(folders / source, folders / "logits" / "shard-00001.safetensors")
        with pytest.raises(ValueError, match="not this shard of this cache"):
            TeacherCache.open(folders / "logits", SPECS["logits"])


def with_head(**entries: Any) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    def change(tensors: dict[str, Tensor], known: dict[str, str]) -> None:
        known["teacher_cache"] = json.dumps(json.loads(known["teacher_cache"]) | entries)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_head(spec="other"), "not the head of this cache"),
        (with_head(scale=10**400), "is no number"),
        (with_head(scale=float("inf")), "scale=inf is not"),
        (with_head(softcap="30"), "is no number"),
        (with_head(num_columns=14), "num_columns=14 is not between 1 and"),
        (with_head(num_columns=1.5), "num_columns is no whole number"),
        (with_head(version=None), "its version is None"),
        (lambda tensors, known: known.clear(), "does not say to which cache"),
        (put(weight=torch.ones(13, 3)), "are 2 wide and its head reads 3"),
        (put(weight=torch.ones(13, 2, dtype=torch.int8)), "weight is not made of floating-point"),
        (put(other=torch.ones(12)), "it holds"),
    ],
)
def test_a_damaged_head_is_refused(change, message: str, folders: Path) -> None:
    folder = folders / "hidden"
    damage(folder / "head.safetensors", change)
    with pytest.raises(ValueError, match=message):
        TeacherCache.open(folder, SPECS["hidden"])
