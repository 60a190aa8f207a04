"""What commands and scripts share: invalid input prints one line and exits with code 2."""

import io
import shlex
import sys
from argparse import ArgumentError
from collections.abc import Callable
from pathlib import Path

from latent_dmmd.utils.errors import one_line


def run(main: Callable[[], None]) -> None:
    """Run a command's `main`; an error that the user can mend, or Ctrl-C, is one line and exit code 2 or 130."""
    for stream in (sys.stdout, sys.stderr):  # a terminal without UTF-8 shows what it cannot print as \u2026
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except (ArgumentError, ValueError, ImportError, OSError, FloatingPointError) as error:
        print(f"{Path(sys.argv[0]).name}: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)


def command_line() -> str:
    """What this process was started by, to be repeated."""
    program, *arguments = sys.argv
    return " ".join([f"python {program}" if program.endswith(".py") else program, shlex.join(arguments)])
