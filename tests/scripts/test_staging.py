import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from moekit.scripts import staging
from moekit.scripts.staging import DiskFullError, check_output, partial_folder, staged_folder
from safetensors import SafetensorError

MIDWAY = RuntimeError("midway")
SETTINGS = {"ratio": 0.5, "out": Path("x")}


def test_output_appears_whole_at_the_end(tmp_path):
    out = tmp_path / "deep" / "out"
    with staged_folder(out, SETTINGS) as stage:
        (stage.output / "figures").mkdir()
        (stage.output / "figures" / "a.png").write_bytes(b"1")
        (stage.output / "model.safetensors").write_bytes(b"2")
        (stage.output / "model.safetensors").chmod(0o600)
        (stage.work / "calibration").write_bytes(b"3")
        assert not stage.resumed
        assert not out.exists()
    assert sorted(p.name for p in out.rglob("*")) == ["a.png", "figures", "model.safetensors"]
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert (out / "model.safetensors").stat().st_mode == (out / "figures" / "a.png").stat().st_mode


@pytest.mark.parametrize("is_written", [False, True])
def test_a_failure_leaves_the_hidden_folder_only_if_something_is_in_it(tmp_path, is_written):
    def fail():
        with staged_folder(tmp_path / "out", SETTINGS) as stage:
            (stage.work / "trainer").mkdir()
            if is_written:
                (stage.work / "trainer" / "weights").write_bytes(b"1")
            raise MIDWAY

    with pytest.raises(RuntimeError, match="midway"):
        fail()
    assert partial_folder(tmp_path / "out").exists() == is_written
    assert bool(list(tmp_path.iterdir())) == is_written


def test_an_empty_folder_may_be_there_already(tmp_path):
    with staged_folder(tmp_path, SETTINGS) as stage:
        (stage.output / "a").write_bytes(b"1")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_symbolic_link_is_refused(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(ValueError, match=r"link' is a symbolic link; give the folder"):
        check_output(tmp_path / "link")


def test_what_may_be_replaced_stays_until_the_end(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_bytes(b"1")
    with pytest.raises(RuntimeError, match="midway"), staged_folder(out, SETTINGS, replace=True):
        raise MIDWAY
    assert [p.name for p in out.iterdir()] == ["old"]
    with staged_folder(out, SETTINGS, replace=True) as stage:
        (stage.output / "new").write_bytes(b"2")
        assert (out / "old").exists()
    assert [p.name for p in out.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_came_meanwhile_is_not_overwritten(tmp_path):
    out = tmp_path / "out"

    def somebody_writes() -> None:
        with staged_folder(out, SETTINGS):
            out.mkdir()
            (out / "mine").write_bytes(b"1")

    with pytest.raises(ValueError, match="not empty"):
        somebody_writes()
    assert [p.name for p in out.iterdir()] == ["mine"]


def fail_midway(out: Path, settings: dict, error: Exception = MIDWAY) -> None:
    with staged_folder(out, settings) as stage:
        (stage.output / "half").write_bytes(b"1")
        (stage.work / "kept").write_bytes(b"2")
        raise error


def test_failure_leaves_no_output_and_an_equal_run_goes_on(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="midway"):
        fail_midway(out, SETTINGS)
    assert not out.exists()
    with staged_folder(out, dict(reversed(SETTINGS.items()))) as stage:
        assert stage.resumed
        assert (stage.work / "kept").read_bytes() == b"2"
        assert list(stage.output.iterdir()) == []
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_run_with_other_settings_starts_anew_and_says_so(tmp_path, caplog):
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="midway"):
        fail_midway(out, SETTINGS)
    with caplog.at_level(logging.WARNING), staged_folder(out, {**SETTINGS, "ratio": 0.25}) as stage:
        assert not stage.resumed
        assert list(stage.work.iterdir()) == []
    assert "other settings (ratio)" in caplog.text


@pytest.mark.parametrize("damage", ["", "[]", '{"hash": 1}'])
def test_a_damaged_state_starts_anew(tmp_path, damage):
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="midway"):
        fail_midway(out, SETTINGS)
    (partial_folder(out) / "state.json").write_text(damage, encoding="utf-8")
    with staged_folder(out, SETTINGS) as stage:
        assert not stage.resumed


def test_an_output_that_holds_something_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(ValueError, match="exists and is not empty; choose another --out"):
        check_output(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        check_output(tmp_path / "file")
    with pytest.raises(ValueError, match="not empty"), staged_folder(tmp_path, SETTINGS):
        pass
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_second_process_is_refused(tmp_path):
    out = tmp_path / "out"
    with staged_folder(out, SETTINGS) as stage:
        (stage.work / "kept").write_bytes(b"2")
        with (
            pytest.raises(ValueError, match=rf"another moekit \(process {os.getpid()}\) is writing"),
            staged_folder(out, {"other": 1}),
        ):
            pass
        assert (stage.work / "kept").exists()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="there is no folder in which nobody can write")
def test_a_folder_that_cannot_be_written_to_is_no_other_process():
    with (
        pytest.raises(OSError, match="No such file or directory: '/proc/"),
        staged_folder(Path("/proc/x"), {}),
    ):
        pass


def test_a_killed_process_does_not_lock_out_the_next(tmp_path):
    out = tmp_path / "out"
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from moekit.scripts.staging import staged_folder\n"
        "with staged_folder(Path(sys.argv[1]), {'a': 1}) as stage:\n"
        "    (stage.work / 'kept').write_bytes(b'2')\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, out], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(ValueError, match=f"process {process.pid}"), staged_folder(out, {"a": 1}):
            pass
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    with staged_folder(out, {"a": 1}) as stage:
        assert stage.resumed
        assert (stage.work / "kept").exists()


def test_too_little_room_is_seen_before_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=17_000_000)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: usage)
    with (
        pytest.raises(
            DiskFullError, match=r"is full: 17,020,000 bytes are needed there and 17,000,000 are free"
        ),
        staged_folder(tmp_path / "out", SETTINGS) as stage,
    ):
        stage.reserve(1_000_000)
    assert not (tmp_path / "out").exists()
    with staged_folder(tmp_path / "out", SETTINGS) as stage:
        stage.reserve(900_000)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_disk_that_fills_up_is_explained(tmp_path, error):
    with pytest.raises(DiskFullError, match=rf"the disk of '{tmp_path}' is full.*give the command again"):
        fail_midway(tmp_path / "out", SETTINGS, error)
    assert not (tmp_path / "out").exists()
    assert (partial_folder(tmp_path / "out") / "work" / "kept").exists()
