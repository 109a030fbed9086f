"""The command line: one file a subcommand (``table`` is with ``sweep``). Heavy imports wait until a command runs."""

import errno
import functools
import signal
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, NoReturn

import typer

from keyreduce import __version__
from keyreduce.cli import (
    benchmark,
    calibrate,
    compare,
    convert_dcp,
    errors,
    inspect,
    prune,
    rank,
    recover,
    registries,
    sweep,
    verify,
)
from keyreduce.cli import eval as evaluate
from keyreduce.cli.command import add_command
from keyreduce.cli.help import Group
from keyreduce.errors import KeyreduceError


class _Entry(NamedTuple):
    """What is said of a command besides its request."""

    show: Callable[..., object]
    panel: str  # the heading under which the list of commands has it.
    examples: tuple[str, str]


_PRUNE, _MEASURE, _FILES, _KNOWN = "Prune", "Measure", "Files", "What is known"
_COMMANDS = {
    "inspect": _Entry(
        inspect.show,
        _PRUNE,
        ("keyreduce inspect Qwen/Qwen3-Next-80B-A3B-Instruct", "keyreduce inspect -m my-model --gpu-memory 80GB"),
    ),
    "calibrate": _Entry(
        calibrate.show,
        _PRUNE,
        ("keyreduce calibrate -m my-model --text my-text.jsonl", "keyreduce calibrate --num-batches 256 --gradients"),
    ),
    "prune": _Entry(
        prune.show,
        _PRUNE,
        (
            "keyreduce prune -m my-model --state-ratio 0.5 --engine vllm",
            "keyreduce prune -m my-model --method wanda --target key --ratio 0.25 -o cut",
        ),
    ),
    "recover": _Entry(
        recover.show,
        _PRUNE,
        (
            "keyreduce recover --mode reconstruct --text my-text.jsonl",
            "keyreduce recover --mode lora --num-batches 500 --lr 1e-4",
        ),
    ),
    "convert-dcp": _Entry(
        convert_dcp.show,
        _FILES,
        ("keyreduce convert-dcp my-model my-model-dcp", "keyreduce convert-dcp trained/step-1000 my-model"),
    ),
    "benchmark": _Entry(
        benchmark.show,
        _MEASURE,
        ("keyreduce benchmark --mixer --decode", "keyreduce benchmark -m my-model --scaling 128,96,64x96"),
    ),
    "eval": _Entry(
        evaluate.show,
        _MEASURE,
        ("keyreduce eval --text held-out.jsonl", "keyreduce eval --state-dtype bfloat16,int8 --recall mqar"),
    ),
    "rank": _Entry(
        rank.show, _MEASURE, ("keyreduce rank --text held-out.jsonl", "keyreduce rank -m my-model --every 256")
    ),
    "sweep": _Entry(sweep.show, _MEASURE, ("keyreduce sweep", "keyreduce sweep my-recipe.toml -m my-model --jobs 4")),
    "table": _Entry(
        sweep.show_table, _MEASURE, ("keyreduce table", "keyreduce table keyreduce-out/sweep -o tables --json")
    ),
    "compare": _Entry(
        compare.show,
        _MEASURE,
        ("keyreduce compare calibration.safetensors other.safetensors", "keyreduce compare cut other-cut --json"),
    ),
    "methods": _Entry(registries.show_methods, _KNOWN, ("keyreduce methods", "keyreduce methods --json")),
    "families": _Entry(registries.show_families, _KNOWN, ("keyreduce families", "keyreduce families --json")),
    "verify": _Entry(verify.show, _FILES, ("keyreduce verify cut --load", "keyreduce verify cut --write-sums")),
}
app = typer.Typer(
    name="keyreduce",
    cls=Group,
    epilog="keyreduce inspect\nkeyreduce prune -m my-model --state-ratio 0.5",
    help="Prune DeltaNet-family language models after training: a smaller recurrent state, loaded as before.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _say_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"keyreduce {__version__}")
        raise typer.Exit


@app.callback()
def _before_commands(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_say_version)
    ] = False,
) -> None:
    pass


for _name, _entry in _COMMANDS.items():
    add_command(app, _entry.show, _name, _entry.panel, _entry.examples)


@functools.cache
def _command() -> Any:
    """Return all commands as one that can be called. Typer itself makes them anew whenever it is called."""
    return typer.main.get_command(app)


def main() -> NoReturn:
    """Run the command line; a user's mistake is reported in one line, with exit code 2.

    A signal (SIGINT, SIGTERM, SIGHUP) ends it with 128 and its number, after what is half made has been removed.
    """
    with errors.unwinding():
        code = _run()
    errors.leave(code)


def _run() -> int:
    # Typer's own mistakes of usage share a base class that it does not export.
    usage_error: Any = typer.BadParameter.__base__
    try:
        # The name that help and completion use, also where Python runs the package as `python -m keyreduce`.
        code = _command()(prog_name="keyreduce", standalone_mode=False) or 0
        # Newer versions of Typer return the code of Ctrl-C, older ones raise.
        return errors.tell_stopped(signal.SIGINT) if code == 128 + signal.SIGINT else code
    except SystemExit as exit_:
        if isinstance(exit_.code, int) and exit_.code > 128:
            return errors.tell_stopped(exit_.code - 128)
        return exit_.code if isinstance(exit_.code, int) else bool(exit_.code)
    except KeyreduceError as error:
        if errors.show_tracebacks:
            raise
        return errors.tell(errors.message_of(error))
    except usage_error as error:
        return errors.tell(_usage(error))
    except (KeyboardInterrupt, typer.Abort):
        return errors.tell_stopped(signal.SIGINT)
    except OSError as error:
        if error.errno not in (errno.EDQUOT, errno.EFBIG, errno.ENOSPC) or errors.show_tracebacks:
            raise
        return errors.tell(f"cannot write {error.filename or 'to stdout or a temporary file'}: {error.strerror}")


def _usage(error: Any) -> str:
    """Return what Typer found wrong with the command line, with near options, and whose help says more."""
    # It has nothing to say where no command was given: the help has been printed.
    message = error.format_message() or "name a command"
    if near := {*(getattr(error, "possibilities", None) or ())} - {"--help"}:
        message = f"{error.message}; did you mean {' or '.join(sorted(near))}?"
    command = error.ctx.command_path if error.ctx else "keyreduce"
    return f"{message} (see {command} --help)"
