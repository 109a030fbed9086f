"""What is handed out: the files of wheel and sdist, what runs from them, and how `make` makes an environment."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"keyreduce": ".", "fla_decode": "flash-linear-attention", "fla_torch": "flash-linear-attention"}
MODEL_FILES = {
    *("config.json", "generation_config.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "training.json"),
}


def _why_not() -> str:
    try:
        found = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        return "needs setuptools"
    return "" if int(found.partition(".")[0]) >= 77 else f"needs setuptools 77 or newer, installed is {found}"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A copy of the repository whose weights are short, its sdist, and the wheel that is built from that."""
    if reason := _why_not():
        pytest.skip(reason)
    copy, out = tmp_path_factory.mktemp("copy") / "keyreduce", tmp_path_factory.mktemp("dist")
    unwanted = shutil.ignore_patterns(".*venv*", ".git", "build", "dist", "*.egg-info", "keyreduce-out", "shared")
    shutil.copytree(ROOT, copy, ignore=unwanted)
    for weights in copy.glob("keyreduce/models/shipped/*/model.safetensors"):
        weights.write_bytes(b"short")

    def backend(hook: str, source: Path) -> None:
        # What `python -m build --no-isolation` calls, which starts four more interpreters.
        code = f"import sys; from setuptools import build_meta; build_meta.{hook}(sys.argv[1])"
        command = [sys.executable, "-c", code, out]
        done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    backend("build_sdist", copy)
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(out / "unpacked", filter="data")
    backend("build_wheel", *(out / "unpacked").iterdir())
    (wheel,) = out.glob("*.whl")
    return copy, sdist, wheel


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(built):
    copy, _, wheel_file = built
    with zipfile.ZipFile(wheel_file) as wheel:
        held = set(wheel.namelist())
    expected = {
        path.relative_to(copy / parent).as_posix()
        for name, parent in PACKAGES.items()
        for path in (copy / parent / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in held if ".dist-info/" not in name} == expected
    models = {"delta-net-5m", "gated-deltanet-5m"}
    assert {f"keyreduce/models/shipped/{model}/{file}" for model in models for file in MODEL_FILES} <= held
    assert {"keyreduce/py.typed", "keyreduce/sweep/recipes/quick.toml"} <= held


def test_the_sdist_holds_what_its_tests_and_docs_need(built):
    copy, sdist_file, _ = built
    with tarfile.open(sdist_file) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    wanted = {"CHANGELOG.md", "CONTRIBUTING.md", "Dockerfile", "LICENSE", "Makefile", "README.md", "mkdocs.yml"}
    wanted |= {"pyproject.toml"}
    for folder in ("benchmarks", "configs", "docs", "flame", "flash-linear-attention", "keyreduce", "tests"):
        files = [path for path in (copy / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        wanted |= {path.relative_to(copy).as_posix() for path in files}
    assert wanted <= held
    assert not [name for name in held if name.endswith(".pyc") or "__pycache__" in name]


def test_metadata(built):
    with zipfile.ZipFile(built[2]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
        metadata = message_from_bytes(wheel.read(name))
        assert any(name.endswith("/licenses/LICENSE") for name in wheel.namelist())
    import keyreduce

    assert (metadata["Name"], metadata["Version"]) == ("keyreduce", keyreduce.__version__)
    assert metadata["License-Expression"] == "MIT" and metadata["Author"]
    classifiers = metadata.get_all("Classifier")
    assert {"Operating System :: POSIX", "Programming Language :: Python :: 3.11", "Typing :: Typed"} <= {*classifiers}
    assert metadata["Description-Content-Type"] == "text/markdown"


def test_the_wheel_runs_without_the_repository(built, tmp_path):
    with zipfile.ZipFile(built[2]) as wheel:
        wheel.extractall(tmp_path / "site")
    code = (
        "import importlib.util, json, keyreduce\n"
        "from keyreduce.checkpoint.find import SHIPPED\n"
        "files = [importlib.util.find_spec(name).origin for name in ('keyreduce', 'fla_decode', 'fla_torch')]\n"
        "print(json.dumps([files, sorted(path.name for path in SHIPPED.iterdir())]))\n"
    )
    options = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(tmp_path / "site")}, "timeout": 120}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    files, models = json.loads(done.stdout)
    assert all(Path(file).is_relative_to(tmp_path / "site") for file in files)
    assert models == ["delta-net-5m", "gated-deltanet-5m"]
    done = subprocess.run([sys.executable, "-m", "keyreduce", "--help"], capture_output=True, text=True, **options)
    assert done.returncode == 0 and "prune" in done.stdout, done.stderr


@pytest.fixture
def make(tmp_path):
    """A function: run `make setup` for an environment in tmp_path; pip is a script that notes what it is asked."""
    folder = tmp_path / "environment"
    (folder / "bin").mkdir(parents=True)

    def script(path: Path, text: str) -> Path:
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return path

    def run(version: str) -> tuple[subprocess.CompletedProcess, str]:
        """With an interpreter that says it is of this version, beside an environment made from 3.11.1."""
        said = "import sys; sys.version = sys.argv.pop(1); sys.version_info = tuple(map(int, sys.version.split('.')))"
        answer = f'exec {sys.executable} -c "{said}; exec(sys.argv[1])"'
        note = f'[ "$1" = -m ] && echo "$@" >> {tmp_path}/asked && exit'
        script(folder / "bin" / "python", f'{answer} 3.11.1 "$2"')
        script(folder / "bin" / "pip", f'echo pip "$@" >> {tmp_path}/asked')
        python = script(tmp_path / "python", f'{note}\n{answer} {version} "$2"')
        (tmp_path / "asked").write_text("")
        command = ["make", "--no-print-directory", "setup", f"PYTHON={python}", f"VENV={folder}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        return done, (tmp_path / "asked").read_text()

    if not shutil.which("make"):
        pytest.skip("needs make")
    return run


def test_make_says_in_one_line_which_python_it_needs(make, tmp_path):
    for version in ("2.7.18", "3.10.13"):
        done, asked = make(version)
        told = f"keyreduce needs Python 3.11 or newer, and {tmp_path}/python is {version}"
        assert done.returncode != 0 and asked == ""
        assert done.stderr.splitlines()[0] == f"{told}; name another one: make PYTHON=python3.11"


def test_make_keeps_an_environment_of_the_same_python_and_replaces_that_of_another(make, tmp_path):
    done, asked = make("3.11.1")
    assert done.returncode == 0, done.stderr
    assert asked.startswith("pip install ") and "venv" not in asked.split()
    (tmp_path / "environment" / ".ready").unlink()
    done, asked = make("3.12.0")
    assert done.returncode == 0, done.stderr
    assert asked.splitlines()[0] == f"-m venv --clear {tmp_path}/environment"
    assert asked.splitlines()[1].startswith("pip install ")
