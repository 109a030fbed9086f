"""The options of ``recover`` that belong to its modes lora and full."""

from typing import Annotated

import typer

_TRAINING = {"rich_help_panel": "Options of --mode lora and full"}
_LORA = {"rich_help_panel": "Options of --mode lora"}

DistillWeight = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="The teacher's share of the loss; the text's next tokens have the rest. Without --teacher, the model that "
        "the pruned one was made from teaches.",
        show_default="1 with --teacher",
        **_TRAINING,
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(help="Of teacher and student, where they are compared.", show_default="2", **_TRAINING),
]
Warmup = Annotated[
    float | None,
    typer.Option(help="Share of the steps in which the learning rate rises.", show_default="0.05", **_TRAINING),
]
MicroBatch = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Rows that a device takes at a time; gradients of a batch add up.",
        show_default="its share of --batch-size",
        **_TRAINING,
    ),
]
Checkpointing = Annotated[
    bool,
    typer.Option("--gradient-checkpointing", help="Compute activations twice, to keep fewer of them.", **_TRAINING),
]
Shard = Annotated[
    bool,
    typer.Option("--shard", help="FSDP: torchrun's processes share out weights, gradients and optimizer.", **_TRAINING),
]
SaveEvery = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Steps between checkpoints, from which the same command goes on after an interruption.",
        show_default="a tenth of --num-batches",
        **_TRAINING,
    ),
]
Kernels = Annotated[
    str | None,
    typer.Option(
        metavar="torch|fla",
        help="keyreduce's PyTorch, which needs no tuning, or fla's own Triton kernels, on GPUs they train on.",
        show_default="torch",
        **_TRAINING,
    ),
]
Rank = Annotated[int | None, typer.Option("--lora-rank", min=1, help="Their rank.", show_default="32", **_LORA)]
Alpha = Annotated[
    float | None, typer.Option("--lora-alpha", help="Their scale times the rank.", show_default="64", **_LORA)
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--lora-targets",
        metavar="NAME",
        help="Linear layers that get a low-rank addition, by the end of their names. May be repeated.",
        show_default="the projections of q, k and v",
        **_LORA,
    ),
]


def training_options(targets: list[str] | None, **given: object) -> dict:
    """Return those that a user gave, as fields of Training. None and a flag's False are not given; 0 is."""
    given = {name: value for name, value in given.items() if value is not None and value is not False}
    return given | ({"targets": tuple(targets)} if targets else {})
