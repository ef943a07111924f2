"""The command line: ``mixpert demo | info | convert | route | calibrate | train | reproduce | kernels | check | tune``.

Every error is one line on stderr and an exit status: 2 for a wrong command line, 1 for all else. ``MIXPERT_DEBUG=1``
shows the traceback instead.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from . import calibrate, check, convert, demo, info, kernels, reproduce, route, train, tune

COMMANDS = (demo, info, convert, route, calibrate, train, reproduce, kernels, check, tune)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    debug = os.environ.get("MIXPERT_DEBUG") == "1"
    if not debug:
        warnings.simplefilter("ignore")
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"mixpert {args.command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        print(f"mixpert {args.command}: {_one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mixpert", description="Mixture-of-vision-experts towers.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    expected = isinstance(error, ValueError | RuntimeError | OSError) and text
    return text if expected else f"{type(error).__name__}: {text}"
