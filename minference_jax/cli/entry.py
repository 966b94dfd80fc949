"""Where the command line starts: a subcommand is run, and a user's mistake becomes one sentence."""

from __future__ import annotations

import os
import sys
import traceback
from importlib import import_module
from pathlib import Path

from minference_jax.cli.parser import UsageError, build_parser

PROGRAM = "minference-jax"
TOO_BIG, MISTAKE, INTERRUPTED = 1, 2, 130  # exit codes
_PACKAGE = Path(__file__).parent.parent


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; exit code 0, 1 for too little memory, 2 for a user's mistake, 130 after Ctrl-C.

    Args:
        argv: arguments without the program's name; None = those of this process.

    Raises:
        SystemExit: after --help and --version.
    """
    try:
        arguments = build_parser(PROGRAM).parse_args(argv)
        import_module(f"minference_jax.cli.{arguments.module}").run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output, as `head` does, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except MemoryError as error:
        print(f"{PROGRAM}: error: {error or 'there is not enough memory'}", file=sys.stderr)
        return TOO_BIG
    except (UsageError, ValueError, NotImplementedError, OSError) as error:
        if not _is_users_mistake(error):
            raise
        print(f"{PROGRAM}: error: {_sentence(error)}", file=sys.stderr)
        return MISTAKE
    return 0


def _is_users_mistake(error: Exception) -> bool:
    """Whether an error was raised by our own checks (or by the system, about a file), not by a fault deeper down."""
    if isinstance(error, UsageError | OSError):
        return True
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return any(raised_in.is_relative_to(folder) for folder in (_PACKAGE, *_folders()))


def _folders() -> list[Path]:
    """Where kernels and convert lie: inside the package, but not where it is installed editable."""
    return [Path(path) for name in ("kernels", "convert") for path in import_module(f"minference_jax.{name}").__path__]


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)
