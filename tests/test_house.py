"""The floors of the house: a folder imports only from those below it, and the command line imports late."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "keyreduce"
BACKEND = REPOSITORY / "flash-linear-attention" / "fla_torch"

# From the top down; the folders of one floor know nothing of each other.
FLOORS = (
    {"__main__"},
    {"cli"},
    {"sweep"},
    {"api"},
    {"pruning"},
    {"recovery"},
    {"benchmarking"},
    {"evaluation"},
    {"calibration"},
    {"data"},
    {"models"},
    {"serving"},
    {"families"},
    {"checkpoint"},
    {"outputs"},
    {"devices", "drawing", "processes", "reporting", "versions", "workspace"},
    {"errors"},
    {"__init__"},
)
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
# Code that transformers copies beside the weights of a model; in there it knows relative imports alone.
SELF_CONTAINED = PACKAGE / "models" / "delta_net_2"
HEAVY = {"torch", "transformers", "fla", "fla_torch", "datasets", "safetensors", "numpy", "triton", "huggingface_hub"}
HEAVY |= {"accelerate", "fla_decode", "lm_eval", "matplotlib", "pandas", "peft", "ray", "scipy"}


def modules(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*.py"))
    assert found
    return found


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def imported(tree: ast.AST) -> Iterator[str]:
    """The full names of all modules that are imported anywhere below a node."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                continue  # where that is allowed, see test_imports_are_absolute
            # The names may be modules themselves: `from keyreduce.cli import options`.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_when_loaded(tree: ast.Module) -> Iterator[str]:
    """The same without what is in functions, and without what is for the types alone."""
    for node in tree.body:
        is_for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not is_for_types and not isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield from imported(node)


@pytest.mark.parametrize("path", modules(PACKAGE), ids=name_of)
def test_a_folder_imports_only_from_those_below_it(path):
    if path == PACKAGE / "__init__.py":
        return  # it hands on the Python API, when that is first touched
    here = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for module in imported(ast.parse(path.read_text())):
        parts = module.split(".")
        if parts[0] != "keyreduce":
            continue
        there = parts[1] if len(parts) > 1 and parts[1] in LEVEL else "__init__"
        assert there == here or LEVEL[there] > LEVEL[here], f"{here} imports {module}"


@pytest.mark.parametrize("path", modules(PACKAGE), ids=name_of)
def test_imports_are_absolute_but_in_code_that_travels(path):
    tree = ast.parse(path.read_text())
    levels = {node.level for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    if SELF_CONTAINED in path.parents:
        assert levels <= {0, 1}
        assert "keyreduce" not in {module.split(".")[0] for module in imported(tree)}
    else:
        assert levels <= {0}


@pytest.mark.parametrize("path", [*modules(PACKAGE / "cli"), *modules(PACKAGE / "api")], ids=name_of)
def test_the_command_line_imports_nothing_heavy_when_it_is_loaded(path):
    if path == PACKAGE / "api" / "functions.py":
        return  # `import keyreduce` loads it when one of its functions is first touched
    for module in imported_when_loaded(ast.parse(path.read_text())):
        assert module.split(".")[0] not in HEAVY


BELOW_THE_API = [path for path in modules(PACKAGE) if LEVEL[path.relative_to(PACKAGE).parts[0].removesuffix(".py")] > 3]


@pytest.mark.parametrize("path", BELOW_THE_API, ids=name_of)
def test_libraries_know_no_flag(path):
    """An error names a field; each caller puts its own word there."""
    strings = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
    flags = [one for one in strings if isinstance(one, str) and re.search(r"(?<!lm_eval )--[a-z]", one)]
    assert not flags


def test_pictures_have_one_look():
    """What a picture looks like, and how it is written, is said in one module."""
    for path in modules(PACKAGE):
        if path != PACKAGE / "drawing.py":
            found = re.findall(r"\.savefig\(|Figure\(|\"#[0-9A-Fa-f]{6}\"", path.read_text())
            assert not found, name_of(path)


def test_no_two_classes_have_one_name():
    names = [
        node.name
        for path in modules(PACKAGE)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("path", modules(BACKEND), ids=name_of)
def test_the_backend_stands_alone(path):
    assert "keyreduce" not in {module.split(".")[0] for module in imported(ast.parse(path.read_text()))}


@pytest.mark.parametrize("path", [*modules(PACKAGE), *modules(BACKEND), *modules(REPOSITORY / "flame")], ids=name_of)
def test_functions_are_short(path):
    """How many branches they have is ruff's to check (C901)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, node.name
