"""``mixpert reproduce``: the paper's comparisons at a small scale."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .extras import require_extra


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "reproduce",
        help="rerun the paper's comparisons at a small scale: tables, plots, a report",
        description="Train small encoders on drawn photographs, charts and documents: joint, continued, "
        "task-specific, separate and Mixpert, over several seeds; write tables, plots and a report. An "
        "interrupted run goes on where it was.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("mixpert-reproduce"),
        metavar="DIR",
        help="where results are kept (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="repetitions (default: 3)")
    parser.add_argument(
        "--quick", action="store_true", help="a minute or two, one seed: shows that it runs"
    )
    parser.add_argument(
        "--pilot",
        action="store_true",
        help="train joint and task-specific encoders of several widths instead: what fixed the sizes",
    )
    parser.add_argument(
        "--processes", type=int, metavar="N", help="at a time, one thread each (default: 2)"
    )
    parser.add_argument(
        "--docs", type=Path, metavar="DIR", help="write the report as DIR/reproduce.md too"
    )
    parser.add_argument(
        "--write-data",
        type=Path,
        metavar="DIR",
        help="write the images as folders SPLIT/DOMAIN/LABEL instead, for mixpert train",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=1000,
        metavar="N",
        help="a domain and split, with --write-data (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="with --write-data (default: 0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the comparisons, or write their data."""
    require_extra("matplotlib", "PIL", "skimage", "sklearn", extra="reproduce")
    from mixpert_kernels.reproduce import run as runs

    if args.write_data is not None:
        runs.write_data(args.write_data, args.images, args.seed)
        return
    settings = runs.choose(args.quick, args.seeds)
    if args.pilot:
        runs.run_pilot(args.out, settings, args.processes)
    else:
        runs.reproduce(args.out, settings, args.processes, args.docs)
