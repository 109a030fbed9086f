"""The options that commands share, each defined once."""

from pathlib import Path
from typing import Annotated

import typer


def _debug(enabled: bool) -> bool:
    if enabled:
        from keyreduce.cli import errors

        errors.show_tracebacks = True
    return enabled


_MODEL = "Hugging Face folder, DCP folder, name on the hub, or name of a shipped model."
_MODEL_OPTION = {"envvar": "BASE_MODEL_DIR", "metavar": "PATH|NAME", "help": _MODEL}
Model = Annotated[str | None, typer.Option(**_MODEL_OPTION, show_default="delta-net-5m")]
DenseModel = Annotated[str | None, typer.Option(**_MODEL_OPTION, show_default="what the pruned model was made from")]
Work = Annotated[
    Path, typer.Option(envvar="KEYREDUCE_WORK", metavar="DIR", help="Where commands find each other's files.")
]
DEFAULT_WORK = Path("keyreduce-out")
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is at --output.")]
# Typer 0.27 takes a metavar that is the parameter's name in capitals for the option's name, where none is given.
Device = Annotated[
    str | None,
    typer.Option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ...", show_default="a GPU if there is one"),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="float32, bfloat16 or float16, to compute in.",
        show_default="bfloat16 on a GPU, float32 on a CPU",
    ),
]
CastTo = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="float32, bfloat16 or float16: cast the weights to it, in files and config.",
        show_default="as they are",
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(metavar="PATH", help="For a DCP without one: the model's config.json, or a folder that holds it."),
]
MaxShardSize = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="The most bytes in a safetensors shard of several tensors: 500MB, 5GB.",
        show_default="the source's shards, or 5GB",
    ),
]
Figures = Annotated[
    Path | None, typer.Option("--output", metavar="FILE", help="The figures as JSON.", show_default="in --work")
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of everything that is drawn.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, all else on stderr.")]
Debug = Annotated[bool, typer.Option("--debug", callback=_debug, is_eager=True, help="Show tracebacks.")]

_TEXT = "Text"
Text = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE|FOLDER",
        rich_help_panel=_TEXT,
        help=".txt, .md, .py, .jsonl or .parquet (field or column 'text'), or a folder of them; may be repeated.",
        show_default="the Python standard library's source",
    ),
]
Dataset = Annotated[
    str | None, typer.Option(metavar="NAME", rich_help_panel=_TEXT, help="A name for datasets, streamed.")
]
DatasetConfig = Annotated[str | None, typer.Option(metavar="C", rich_help_panel=_TEXT, help="Its configuration.")]
Split = Annotated[str | None, typer.Option(metavar="S", rich_help_panel=_TEXT, help="Its split.", show_default="train")]

NumBatches = Annotated[int, typer.Option(envvar="NUM_BATCHES", help="Batches to run.")]
MeasuredBatches = Annotated[
    int, typer.Option("--num-batches", envvar="NUM_BATCHES", min=0, help="Batches to measure on; 0 takes all the text.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows in a batch.")]
SeqLen = Annotated[int, typer.Option(help="Tokens in a row.")]
Compressed = Annotated[
    str | None,
    typer.Option(
        envvar="COMPRESSED_MODEL",
        metavar="PATH",
        help="The pruned model to compare with --model.",
        show_default="what prune or recover wrote into --work",
    ),
]
