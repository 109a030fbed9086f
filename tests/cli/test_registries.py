"""``keyreduce methods`` and ``families`` list what the registries hold."""

import re

import pytest

from keyreduce.families import FAMILIES, LANGUAGE_MODELS, REFUSED
from keyreduce.pruning.methods import METHODS


def test_every_method_is_listed_with_what_it_needs(keyreduce):
    listed = {one["name"]: one for one in keyreduce("methods", "--json").json()["methods"]}
    assert [*listed] == [*METHODS]
    for name, method in METHODS.items():
        assert (listed[name]["summary"], listed[name]["paper"]) == (method.summary, method.citation)
        assert listed[name]["targets"] == [*method.select]
        assert {option["name"]: option["default"] for option in listed[name]["options"]} == dict(method.options)
        assert all(option["help"] for option in listed[name]["options"]), name
    needs = {name: one["needs"] for name, one in listed.items()}
    assert needs["taylor"] == "statistics with gradients"
    assert {name for name in needs if needs[name] == "nothing"} == {"l1", "l2", "random"}


def test_every_family_is_listed(keyreduce):
    listed = keyreduce("families", "--json").json()
    names = {one["model_type"] for one in listed["families"]}
    within = {name for one in listed["families"] for name in one["within"]}
    assert names == set(LANGUAGE_MODELS) and names | within == set(FAMILIES)
    assert listed["refused"] == REFUSED
    for one in listed["families"]:
        assert re.fullmatch(r"arXiv:\d{4}\.\d{5}", one["paper"])
        assert one["needs"] in ("fla", "transformers", "keyreduce")
        gated = {"qwen3_next", "gated_deltanet", "olmo_hybrid"}
        assert (one["rule"] == "gated delta rule") >= (one["model_type"] in gated)


@pytest.mark.parametrize("command", ["methods", "families"])
def test_a_table_of_80_columns_breaks_no_name(keyreduce, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    out = keyreduce(command).out
    for name in METHODS if command == "methods" else LANGUAGE_MODELS:
        assert re.search(rf"^  {name} ", out, re.MULTILINE)
    papers = {one.paper for one in LANGUAGE_MODELS.values()} if command == "families" else {"arXiv:2602.04852"}
    assert all(paper in out for paper in papers)
