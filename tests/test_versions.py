"""The versions that messages name are those that pyproject.toml allows and that the pinned lists have."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from versions import PLAIN, WITH_EXTRAS

from keyreduce import versions

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [Requirement(line) for line in PROJECT["dependencies"]]
REQUIREMENTS += [Requirement(line) for lines in PROJECT["optional-dependencies"].values() for line in lines]


def pins(name: str) -> dict[str, str]:
    """Return package -> version of a list of pinned versions."""
    found = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "configs" / name).read_text(), re.MULTILINE)
    return {canonicalize_name(package): pin for package, pin in found}


def test_messages_name_the_range_of_transformers():
    (allowed,) = [one.specifier for one in REQUIREMENTS if one.name == "transformers"]
    assert versions.OLDEST_TRANSFORMERS in allowed
    assert f"{versions.NEWEST_TRANSFORMERS}.99" in allowed
    series = Version(versions.NEWEST_TRANSFORMERS)
    assert f"{series.major}.{series.minor + 1}.0" not in allowed
    assert not any(allowed.contains(older) for older in ("5.6.1", "5.5.4", "4.57.6"))
    assert pins("constraints-oldest.txt")["transformers"] == versions.OLDEST_TRANSFORMERS
    assert pins("constraints.txt")["transformers"].startswith(f"{versions.NEWEST_TRANSFORMERS}.")


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-oldest.txt"])
def test_what_is_pinned_is_allowed(name):
    pinned = pins(name)
    for requirement in REQUIREMENTS:
        if canonicalize_name(requirement.name) in pinned:
            assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def test_lower_bounds_are_those_of_the_oldest_list():
    """But for torch and triton, of which older ones were run on a GPU; the list says why."""
    pinned = pins("constraints-oldest.txt")
    for requirement in REQUIREMENTS:
        lowest = [one.version for one in requirement.specifier if one.operator == ">="]
        name = canonicalize_name(requirement.name)
        if name in pinned and lowest and name not in ("torch", "triton"):
            assert Version(pinned[name]) == Version(lowest[0]), requirement


def test_what_the_versions_are_tested_with_is_there():
    """A path that is gone would end the run only after the environment was built."""
    assert [path for path in (*PLAIN, *WITH_EXTRAS) if not (ROOT / path).exists()] == []


def test_the_note_names_the_installed_version(monkeypatch):
    assert versions.tested_versions().endswith(f"installed is {importlib.metadata.version('transformers')}")
    monkeypatch.setattr(versions, "version", lambda name: "5.99.0")
    assert versions.tested_versions() == "keyreduce works with transformers 5.6.2 to 5.24, installed is 5.99.0"


def test_fla_alone_needs_a_note_about_generation():
    assert "5.6.2 to 5.23" in versions.generation_note("fla")
    assert [versions.generation_note(one) for one in ("transformers", "keyreduce", None)] == [None] * 3
