"""``keyreduce methods`` and ``keyreduce families``: what can be used, and what can be pruned."""

import re

from keyreduce.api import registries
from keyreduce.cli.console import Console


def show_methods(request: registries.MethodsRequest, console: Console) -> None:
    """Print the methods and their options."""
    result = registries.methods(request, console)
    rows = [[one["name"], one["needs"], ", ".join(one["targets"]), _paper(one["paper"])] for one in result.methods]
    console.table("", ("method", "needs", "cuts", "paper"), rows, whole=("method", "needs", "cuts"))
    rows = []
    for one in result.methods:
        rows.append([one["name"], one["summary"]])
        for option in one["options"]:
            meaning = f": {option['help']}" if option["help"] else ""
            rows.append(["", f"--set {option['name']}={option['default']}{meaning}"])
    console.table("", ("method", "chooses by; its options, with their defaults"), rows, whole=("method",))
    console.finish(result)


def show_families(request: registries.FamiliesRequest, console: Console) -> None:
    """Print the architectures, and those that are refused."""
    result = registries.families(request, console)
    rows = [[one["model_type"], one["rule"], one["needs"], one["paper"]] for one in result.families]
    console.table("", ("model_type", "state", "needs", "paper"), rows, whole=("model_type", "paper"))
    within = [f"{wrapper} ({one['model_type']})" for one in result.families for wrapper in one["within"]]
    console.say(f"larger models with one of these inside: {', '.join(within)}")
    console.say(f"known and refused, for reasons that --json gives: {', '.join(result.refused)}")
    console.finish(result)


def _paper(citation: str) -> str:
    """Return the numbers of a citation's papers, or what it says where they have none."""
    return "\n".join(re.findall(r"arXiv:[\d.]+\d", citation)) or citation
