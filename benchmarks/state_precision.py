"""What storing the recurrent state in fewer bits costs models of 5M and 21M parameters, and what saves 4 bits.

    python benchmarks/state_precision.py [--model PATH --heldout FILE] [--only NAME ...]
    python benchmarks/state_precision.py --table

Each study is `keyreduce eval --state-dtype ...` on held-out text, and leaves a file of its own in
`benchmarks/state_precision`. Those of the shipped models take the source of Python's standard library; --model is a
further model with a text of its own, in rows of 1,024 tokens. At the end, and with --table, which measures nothing,
all files that are there are printed as Markdown.
"""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from result_tables import precision_table

from keyreduce.api import evaluate
from keyreduce.api.evaluate import EvaluateRequest
from keyreduce.checkpoint.find import find_model
from keyreduce.checkpoint.folder import open_folder

FOLDER = Path(__file__).with_suffix("")
ALL = (
    "bfloat16", "float16", "int8", "int8-key", "int8-key-32", "fp8", "fp8-head", "int4", "int4-rotated", "int4-32",
    "int4-key", "int4-key-32",
)  # fmt: skip
FEWER = tuple(name for name in ALL if name not in ("int8-key-32", "int4-key", "int4-key-32"))
LONG = ("bfloat16", "int8")
MIXED = ("bfloat16", "int8", "int4-key", "auto")


class Study(NamedTuple):
    """One run of eval: what is measured, and on how many rows of how many tokens."""

    model: str
    seq_len: int
    rows: int
    formats: tuple[str, ...]
    chunk: int | None = None
    text: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        """That of the file."""
        parts = [Path(self.model).name, str(self.seq_len)]
        parts += [f"chunk-{self.chunk}"] if self.chunk else []
        return "-".join([*parts, "auto"] if "auto" in self.formats else parts)

    @property
    def command(self) -> str:
        """What a user would type."""
        chunk = f" --state-chunk {self.chunk}" if self.chunk else ""
        text = f" --text {self.text[0].name}" if self.text else ""
        return (
            f"keyreduce eval --model {Path(self.model).name}{text} --seq-len {self.seq_len} --batch-size 1 "
            f"--num-batches {self.rows} --state-dtype {','.join(self.formats)}{chunk}"
        )


def studies(model: str | None, heldout: Path | None) -> list[Study]:
    """Return what is measured."""
    found = []
    for shipped in ("delta-net-5m", "gated-deltanet-5m"):
        found.append(Study(shipped, 4096, 2, ALL))
        found.append(Study(shipped, 4096, 2, ("int8", "fp8", "int4"), chunk=256))
        found.append(Study(shipped, 4096, 1, MIXED))
    found.append(Study("delta-net-5m", 32768, 1, LONG))
    if model is not None:
        found.append(Study(model, 1024, 3, FEWER, text=(heldout,) if heldout else ()))
    return found


def measure(study: Study) -> dict:
    """Run eval, and return its figures without anything that depends on where files are."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        request = EvaluateRequest(
            model=study.model, work=Path(work), device="cpu", seq_len=study.seq_len, batch_size=1,
            num_batches=study.rows, state_dtype=study.formats, state_chunk=study.chunk, text=study.text,
        )  # fmt: skip
        report = evaluate.run(request)
    assert report is not None
    checkpoint = open_folder(find_model(study.model))
    parameters = sum(math.prod(spec.shape) for spec in checkpoint.tensors.values())
    known = {"command": study.command, "model": Path(study.model).name, "parameters": parameters}
    known |= {"seq_len": study.seq_len, "rows": study.rows, "seconds": round(time.perf_counter() - began)}
    return known | report.content["models"][0]["precision"]


def table(files: list[Path]) -> str:
    """Return Markdown: a table of costs, one of drift and one of heads for each study."""
    return "\n".join(line for file in files for line in precision_table(json.loads(file.read_text())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="A further model.")
    parser.add_argument("--heldout", type=Path, help="Its text.")
    parser.add_argument("--only", nargs="+", help="The studies of these names alone.")
    parser.add_argument("--table", action="store_true", help="Measure nothing.")
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    for study in [] if options.table else studies(options.model, options.heldout):
        if options.only and study.name not in options.only:
            continue
        (FOLDER / f"{study.name}.json").write_text(json.dumps(measure(study), indent=1) + "\n")
        print(f"{study.name} is measured", flush=True)
    print(table(sorted(FOLDER.glob("*.json"))))


if __name__ == "__main__":
    main()
