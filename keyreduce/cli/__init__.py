"""The command line: one file a subcommand (``table`` is with ``sweep``). Heavy imports wait until a command runs."""

import errno
import signal
from typing import Annotated, Any, NoReturn

import typer

from keyreduce import __version__
from keyreduce.cli import benchmark, calibrate, convert_dcp, errors, inspect, prune, rank, recover, sweep, verify
from keyreduce.cli import eval as evaluate
from keyreduce.cli.command import add_command
from keyreduce.errors import KeyreduceError

_SHOWS = {
    "inspect": inspect.show,
    "calibrate": calibrate.show,
    "prune": prune.show,
    "recover": recover.show,
    "convert-dcp": convert_dcp.show,
    "benchmark": benchmark.show,
    "eval": evaluate.show,
    "rank": rank.show,
    "sweep": sweep.show,
    "table": sweep.show_table,
    "verify": verify.show,
}
app = typer.Typer(
    name="keyreduce",
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


for _name, _show in _SHOWS.items():
    add_command(app, _show, _name)


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
        return app(prog_name="keyreduce", standalone_mode=False) or 0
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else bool(exit_.code)
    except KeyreduceError as error:
        if errors.show_tracebacks:
            raise
        return errors.tell(errors.message_of(error))
    except usage_error as error:
        return errors.tell(_usage(error))
    except (KeyboardInterrupt, typer.Abort):
        return 128 + signal.SIGINT
    except OSError as error:
        if error.errno not in (errno.EDQUOT, errno.EFBIG, errno.ENOSPC) or errors.show_tracebacks:
            raise
        return errors.tell(f"cannot write {error.filename or 'to stdout or a temporary file'}: {error.strerror}")


def _usage(error: Any) -> str:
    """Return what Typer found wrong with the command line, with near options, and whose help says more."""
    # It has nothing to say where no command was given: the help has been printed.
    message = error.format_message() or "name a command"
    if near := getattr(error, "possibilities", None):
        message = f"{error.message}; did you mean {' or '.join(sorted(near))}?"
    command = error.ctx.command_path if error.ctx else "keyreduce"
    return f"{message} (see {command} --help)"
