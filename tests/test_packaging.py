"""What the wheel holds, and that the house's own papers agree with each other."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGE_DIR: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", *PACKAGE_DIR.values())


def _run(*command: str | Path, cwd: Path) -> str:
    """Run outside the checkout and without its environment; the output is the failure message."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV"))}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=outside,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # From a copy: setuptools leaves build/ beside its sources, and a stale one would hide a missing file.
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, ignore=ignored, dirs_exist_ok=True)
        else:
            shutil.copy(ROOT / name, source / name)
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", source, cwd=source)
    (built,) = (source / "dist").glob("moekit-*.whl")
    return built


@pytest.fixture(scope="module")
def clean_environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment with the wheel and this one's dependencies, but not its editable moekit.

    The dependencies come through a path file. Python does not process the path files of a folder that is
    itself added so; hence the finder of the editable install stays unknown there.
    """
    folder = tmp_path_factory.mktemp("clean") / "venv"
    _run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    quiet = ("--disable-pip-version-check", "install", "--quiet")
    install = (*quiet, "--no-index", "--no-deps", wheel)
    _run(sys.executable, "-m", "pip", "--python", python, *install, cwd=folder.parent)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site_packages / "dependencies.pth").write_text("\n".join(sorted(dependencies)) + "\n")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGE_DIR)
def test_wheel_holds_the_whole_package_and_imports(clean_environment: Path, package: str) -> None:
    code = f"import {package} as p; print(p.__file__)"
    printed = _run(clean_environment / "bin" / "python", "-I", "-c", code, cwd=clean_environment)
    installed = Path(printed.splitlines()[-1]).parent
    assert installed.is_relative_to(clean_environment)

    def files(folder: Path) -> set[Path]:
        # What has no suffix is a contributor's program, such as scripts/setup.
        paths = (path.relative_to(folder) for path in folder.rglob("*.*") if path.is_file())
        return {path for path in paths if "__pycache__" not in path.parts}

    assert files(installed) == files(ROOT / PACKAGE_DIR[package])
    assert (installed / "py.typed").exists()


@pytest.mark.slow
def test_command_of_the_wheel_answers(clean_environment: Path) -> None:
    assert "compress" in _run(clean_environment / "bin" / "moekit", "--help", cwd=clean_environment)


@pytest.mark.slow
def test_wheel_claims_no_top_level_name_but_moekit(clean_environment: Path) -> None:
    (site_packages,) = clean_environment.glob("lib/python*/site-packages")
    names = {path.name for path in site_packages.iterdir()} - {"dependencies.pth", "__pycache__"}
    assert {name for name in names if not name.endswith(".dist-info")} == {"moekit"}
    assert not (site_packages / "moekit" / "__init__.py").exists()


def test_each_package_folder_is_listed_by_name() -> None:
    setuptools = PROJECT["tool"]["setuptools"]
    found = {
        ".".join((package, *init.parent.relative_to(ROOT / folder).parts))
        for package, folder in PACKAGE_DIR.items()
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert set(setuptools["packages"]) == found


def test_installed_version_is_the_declared_one_and_has_a_changelog_entry() -> None:
    version = PROJECT["project"]["version"]
    assert importlib.metadata.version("moekit") == version
    assert re.search(rf"^## \[{re.escape(version)}\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_constraints_pin_every_dependency_within_its_bounds() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.lower().replace("_", "-").split("==") for line in lines if line and line[0] != "#")
    project = PROJECT["project"]
    for text in (*project["dependencies"], *project["optional-dependencies"]["dev"]):
        requirement = Requirement(text)
        assert requirement.name in pinned
        assert requirement.specifier.contains(pinned[requirement.name]), text


def test_paper_index_names_files_that_exist() -> None:
    rows = [line for line in (ROOT / "PAPERS.md").read_text().splitlines() if line.startswith("| ")]
    table = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    papers = [row for row in table if len(row) == 5 and row[0] != "paper"]
    others = [row for row in table if len(row) == 4 and row[0] != "paper"]
    done = [paper for paper in papers if paper[-1].startswith("done")]
    assert len(papers) == 16
    assert done
    assert others
    for paper in done + others:
        named = re.findall(r"`([^`]+\.py)`", "".join(paper[2:4]))
        assert named
        assert [name for name in named if not (ROOT / name).exists()] == []
