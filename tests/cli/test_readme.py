"""The commands of README and docs: those that take seconds run, all are parsed; and what the pages lead to is there."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from safetensors.torch import load_file

from keyreduce.checkpoint.find import find_model
from keyreduce.cli import app, command
from keyreduce.data.text import stdlib_files

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
OWN = ("README.md", "CONTRIBUTING.md", "flame/README.md", "flash-linear-attention/README.md")
PAGES = [*(ROOT / name for name in OWN), *sorted(ROOT.glob("docs/*.md"))]
COMMANDS = [one.name for one in app.registered_commands]

# What the README's code generates is what the model says of the whole text before each token.
WITHOUT_STATE = """
generated, length = model.generate(**tokens, max_new_tokens=16), tokens["input_ids"].shape[1]
scores = model(generated, use_cache=False).logits[0, length - 1 : -1]
assert generated.shape[1] == length + 16
assert scores.argmax(-1).tolist() == generated[0, length:].tolist()
"""


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```$", text, flags=re.MULTILINE | re.DOTALL)


def commands_to_run(text: str) -> list[str]:
    """The commands of all shell blocks but those before which stands why not."""
    return _lines(blocks("sh", re.sub(r"<!-- parsed only: .*? -->\n *```sh\n.*?```", "", text, flags=re.DOTALL)))


def commands_to_parse(text: str) -> list[str]:
    """All other commands, in blocks and within a text; of torchrun and docker what they run."""
    # The examples of the help are parsed by its own test.
    text = re.sub(r"<!-- made by .*?<!-- end -->", "", text, flags=re.DOTALL)
    found = re.findall(r"^(.*)$", text, flags=re.MULTILINE) + re.findall(r"`([^`\n]+)`", text)
    started = rf"^(?:[ $]*|.*torchrun .* -m |.*docker run .* )(keyreduce (?:{'|'.join(COMMANDS)})(?: .*)?)$"
    matches = (re.match(started, line.partition("  #")[0].rstrip()) for line in found)
    commands = dict.fromkeys(match[1] for match in matches if match and "..." not in match[1])
    return [line for line in commands if line not in commands_to_run(text)]


def _lines(blocks: list[str]) -> list[str]:
    lines = (line.partition("  #")[0].strip() for block in blocks for line in block.splitlines())
    return [line for line in lines if line.startswith(("keyreduce ", "make ", "torchrun "))]


def python(word: str, text: str) -> str:
    """The one block of Python that holds a word."""
    (code,) = [block for block in blocks("python", text) if word in block]
    return code


def test_commands_of_the_pages_run(keyreduce):
    """In the order of the site's contents, in one folder, on a model and texts that the reader is to have."""
    Path("my-model").symlink_to(find_model("delta-net-5m"))
    documents = [path.read_text()[:1500] for path in stdlib_files("heldout")[:4]]
    for name, part in {"my-text.jsonl": documents[:2], "held-out.jsonl": documents[2:]}.items():
        Path(name).write_text("".join(json.dumps({"text": document}) + "\n" for document in part))
    order = re.findall(r"^ +- .*: ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    pages = [ROOT / "docs" / name for name in order if (ROOT / "docs" / name).is_file()]
    lines = [line for page in pages for line in commands_to_run(page.read_text())]
    assert len(lines) >= 20
    for line in lines:
        result = keyreduce(*shlex.split(line)[1:])
        assert result.code == 0, f"{line}: {result.err}"
    code = python("from_pretrained", README)
    subprocess.run([sys.executable, "-c", code + WITHOUT_STATE], check=True, capture_output=True, timeout=600)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_parse(page, keyreduce, monkeypatch):
    def parsed(**_):  # a command makes it when its request has been made and checked
        raise SystemExit(0)

    monkeypatch.setattr(command, "Console", parsed)
    for line in commands_to_parse(page.read_text()):
        assert keyreduce(*shlex.split(line)[1:]).code == 0, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_scripts_are_there_and_have_the_options_that_are_named(page):
    text = page.read_text()
    for name, options in re.findall(r"python ([\w-]+/\w+\.py)([^`\n#]*)", text):
        source = (ROOT / name).read_text()
        for option in re.findall(r"(?<= --)[a-z][\w-]*", options):
            # Declared as a flag, or as a parameter of which one is made.
            assert re.search(rf"--{option}\b|\b{option.replace('-', '_')}: ", source), f"{name} has no --{option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^()\s:#]*)(?:#([^()\s]+))?\)", page.read_text()):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, anchor


def test_the_readme_is_short():
    assert len(README.encode()) < 8 * 1024


@pytest.mark.parametrize(("word", "page"), [("keyreduce.calibrate", "python"), ("from_pretrained", "getting-started")])
def test_the_python_of_the_readme_is_that_of_the_docs(word, page):
    """Of python.md another test runs it, of the other page the one above does."""
    assert python(word, README) in blocks("python", (ROOT / f"docs/{page}.md").read_text())


def test_what_is_made_from_the_code_is_as_the_code_is():
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    for page in reference.PAGES:
        assert reference.renewed(page.read_text()) == page.read_text(), f"{page}: run python docs/reference.py"


def test_the_method_of_the_guide_is_found_where_another_package_registers_it(tmp_path, keyreduce):
    package = tmp_path / "site"
    (package / "your_package-1.0.dist-info").mkdir(parents=True)
    (package / "your_package-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: your_package\n")
    (entry_points,) = [block for block in blocks("toml", CONTRIBUTING) if "entry-points" in block]
    table = tomllib.loads(entry_points)["project"]["entry-points"]
    lines = [f"[{group}]\n{name} = {value}\n" for group, points in table.items() for name, value in points.items()]
    (package / "your_package-1.0.dist-info" / "entry_points.txt").write_text("\n".join(lines))
    (package / "your_package").mkdir()
    (package / "your_package" / "unit_energy.py").write_text(python("Method(", CONTRIBUTING))
    path = os.pathsep.join([str(package), str(ROOT), str(ROOT / "flash-linear-attention")])

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "keyreduce", *arguments]
        environment = os.environ | {"PYTHONPATH": path, "COLUMNS": "200"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert keyreduce("calibrate", "--num-batches", 1, "--batch-size", 1, "--seq-len", 64, "--work", "out").code == 0
    assert "unit-energy" in run("methods")
    assert "pruned with unit-energy" in run("prune", "--method", "unit-energy", "--keep", "8", "--work", "out")
    step = json.loads(Path("out/pruned/keyreduce.json").read_text())["steps"][0]
    sums = load_file("out/calibration.safetensors")
    for layer, cut in step["layers"].items():
        gram_HKK = sums[f"layers.{layer}.unit_query_gram_HKK"] + sums[f"layers.{layer}.unit_key_gram_HKK"]
        for gram_KK, kept in zip(gram_HKK, cut["key"], strict=True):
            assert kept == sorted(gram_KK.diagonal().argsort(descending=True, stable=True)[:8].tolist())
    # Where the package is not installed, the method is not there.
    result = keyreduce("prune", "--method", "unit-energy", "--keep", 8, "--work", "out", "--overwrite")
    assert result.code == 2
    assert "there is no method 'unit-energy'" in result.err


@pytest.mark.parametrize("line", [line for line in _lines(blocks("sh", README)) if line.startswith("make ")])
def test_targets_of_the_readme_exist(line):
    result = subprocess.run([*shlex.split(line), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_session_is_what_the_demo_begins_with():
    session = re.findall(r"^\$ (keyreduce .*)$", README, flags=re.MULTILINE)
    dry_run = subprocess.run(["make", "demo", "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert len(session) == 3
    assert session == re.findall(r"^\S*/(keyreduce .*)$", dry_run, flags=re.MULTILINE)[: len(session)]
