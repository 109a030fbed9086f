"""Every model of the installed transformers and fla whose code calls a delta rule is a family, or is refused.

A release that brings a new one fails here: add its table to ``keyreduce/families``, or the reason to ``REFUSED``.
"""

import re
from functools import cache
from pathlib import Path

import fla
import pytest
import transformers

from keyreduce.families import FAMILIES, REFUSED

FLA, MODELS = Path(fla.__file__).parent, Path(transformers.__file__).parent / "models"
# An operator, in the code of a model: chunk_gated_delta_rule(, chunk_kimi_delta_attention(, fused_recurrent_kda(.
CALL = re.compile(r"(delta_rule|delta_attention|delta_net|_kda)\w*\(")
# What an operator of fla defines or imports: the rule by name, its WY form, its transitions.
RULE = re.compile(r"^(def|from|import)\b.*(delta_?(rule|former)|\bwy_|_wy_|dplr|householder|kda|mesa)", re.MULTILINE)
NAME = re.compile(r'^    model_type = ["\'](\w+)["\']', re.MULTILINE)
LANGUAGE = re.compile(r"\blayer_types\b|\btext_config\b")
HELD = re.compile(r'"text_config": SubConfigSpec\([^)]*model_type="(\w+)"')


def text_of(folder: Path, start: str) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob(f"{start}*.py")))


@cache
def of_transformers() -> dict[str, str]:
    """Model type -> its folder, of all language models that call an operator, and of larger models that hold one."""
    calling, holding = {}, {}
    for folder in MODELS.iterdir():
        calls = bool(CALL.search(text_of(folder, "modeling_")))
        for text in re.split(r"^class ", text_of(folder, "configuration_"), flags=re.MULTILINE)[1:]:
            name, held = NAME.search(text), HELD.search(text)
            if name and calls and LANGUAGE.search(text):
                calling[name[1]] = folder.name
            elif name and held:
                holding[name[1]] = held[1]
    return calling | {name: held for name, held in holding.items() if held in calling}


@cache
def of_fla() -> dict[str, str]:
    """Model type -> the operator of its layer that is a delta rule."""
    rules = {
        folder.name for folder in (FLA / "ops").iterdir() if folder.is_dir() and RULE.search(text_of(folder, "[a-z_]"))
    }
    found = {}
    for folder in sorted(FLA.glob("models/*/")):
        text = text_of(folder, "modeling_")
        layers = {*re.findall(r"from fla\.layers\.(\w+) import", text)}
        classes = re.findall(r"from fla\.layers import (\w+)", text)
        layers |= {getattr(fla.layers, name).__module__.split(".")[-1] for name in classes}
        code = "\n".join((FLA / "layers" / f"{layer}.py").read_text() for layer in layers)
        operators = set(re.findall(r"^from fla\.ops\.(\w+)", code, re.MULTILINE)) & rules
        for name in NAME.findall(text_of(folder, "configuration_")):
            if operators:
                found[name] = ", ".join(sorted(operators))
    return found


@pytest.mark.parametrize("listed", [of_transformers, of_fla])
def test_each_is_known_or_refused(listed):
    unknown = {name: why for name, why in listed().items() if name not in FAMILIES.keys() | REFUSED.keys()}
    assert not unknown


def test_the_list_finds_what_is_known():
    """The patterns above fit the code: no family of an installed library is missing from the lists."""
    installed = of_transformers() | of_fla()
    of_libraries = {name for name, family in FAMILIES.items() if family.shipped_by != "keyreduce"}
    absent = {name for name in of_libraries if name not in transformers.CONFIG_MAPPING}
    assert of_libraries - absent <= installed.keys()
    assert {"comba", "deltaformer", "gated_deltaproduct", "mesa_net", "mom", "path_attn", "rwkv7"} <= installed.keys()
