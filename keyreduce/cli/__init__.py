"""The command line: one file a subcommand (``table`` is with ``sweep``). Heavy imports wait until a command runs."""

import errno
import signal
from typing import Any, NoReturn

import typer

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
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
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
        return app(standalone_mode=False) or 0
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else bool(exit_.code)
    except KeyreduceError as error:
        if errors.show_tracebacks:
            raise
        return errors.tell(errors.message_of(error))
    except usage_error as error:
        # It has nothing to say where no command was given: the help has been printed.
        return errors.tell(f"{error.format_message() or 'name a command'} (see keyreduce --help)")
    except (KeyboardInterrupt, typer.Abort):
        return 128 + signal.SIGINT
    except OSError as error:
        if error.errno not in (errno.EDQUOT, errno.EFBIG, errno.ENOSPC) or errors.show_tracebacks:
            raise
        return errors.tell(f"cannot write {error.filename or 'to stdout or a temporary file'}: {error.strerror}")
