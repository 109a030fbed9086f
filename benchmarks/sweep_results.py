"""The results of sweeps as one file that can be committed, for benchmarks/results.py."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keyreduce.drawing import text_words
from keyreduce.outputs import write_json
from keyreduce.sweep.results import read_results


def keep(folders: Sequence[Path], output: Path) -> None:
    """Write the results of sweeps as one file of this folder, without anything of the machine's."""
    whole: dict[str, Any] = {"dense": {}, "rows": [], "failed": {}, "waiting": []}
    commands, records = [], []
    for folder in folders:
        results = read_results(folder)
        found, record = results.to_json(), results.record
        records.append(record)
        seeds = sorted({run["seed"] for run in record["runs"] if "seed" in run})
        # A recipe that ships is named, another one is a file of this repository.
        recipe = Path(record["recipe"])
        ships = recipe.parent.name == "recipes" or not recipe.suffix
        named = recipe.stem if ships else f"benchmarks/quality/{recipe.name}"
        seed = f" --seed {seeds[0]}" if len(seeds) == 1 else ""  # several are those of the recipe
        commands.append(f"keyreduce sweep {named}{seed} --output FOLDER")
        whole["dense"] |= found["dense"]
        way = ("model", "target", "label", "repair", "ratio")
        for row in found["rows"]:
            same = [one for one in whole["rows"] if all(one[name] == row[name] for name in way)]
            if not same:
                whole["rows"].append(row)
            elif row["seeds"] > same[0]["seeds"]:
                whole["rows"][whole["rows"].index(same[0])] = row
        whole["failed"] |= found["failed"]
        whole["waiting"] += found["waiting"]
    if whole["waiting"]:
        sys.exit(f"{len(whole['waiting'])} runs are not done yet, such as {whole['waiting'][0]}")
    last = records[-1]
    for text in (last[name]["text"] for name in ("calibration", "heldout")):
        if "paths" in text:
            text["paths"] = [Path(path).name for path in text["paths"]]
    words = ", ".join(_amounts(name, last[name]) for name in ("calibration", "heldout"))
    about = {name: last[name] for name in ("device", "dtype", "heldout")}
    whole["record"] = about | {"commands": [*commands, _kept(folders, output)], "words": words}
    write_json(output, whole, overwrite=True)


def _kept(folders: Sequence[Path], output: Path) -> str:
    return f"python benchmarks/results.py --keep{' FOLDER' * len(folders)} --output benchmarks/quality/{output.name}"


def _amounts(name: str, text: Mapping) -> str:
    tokens = text["num_batches"] * text["batch_size"] * text["seq_len"]
    return f"{name}: {tokens:,} tokens ({text_words(text['text'])})"
