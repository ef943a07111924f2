"""``mixpert reproduce``: the papers' comparisons at a small scale."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .extras import require_extra


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "reproduce",
        help="rerun the papers' comparisons at a small scale: tables, plots, a report",
        description="Train small models on drawn images, over several seeds; write tables, plots and a report. "
        "mixpert (the default): encoders, joint, continued, task-specific, separate and Mixpert. mome: vision "
        "experts pooled or transformed, added or routed, and language experts against one adapter. An interrupted "
        "run goes on where it was.",
    )
    parser.add_argument(
        "paper",
        nargs="?",
        choices=("mixpert", "mome"),
        default="mixpert",
        help="whose comparisons (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where results are kept (default: mixpert-reproduce, or mome-reproduce)",
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="repetitions (default: 3)")
    parser.add_argument(
        "--quick", action="store_true", help="a minute or two, one seed: shows that it runs"
    )
    parser.add_argument(
        "--pilot",
        action="store_true",
        help="mixpert: train joint and task-specific encoders of several widths instead, which fixed the sizes",
    )
    parser.add_argument(
        "--processes", type=int, metavar="N", help="at a time, one thread each (default: 2)"
    )
    parser.add_argument(
        "--docs",
        type=Path,
        metavar="DIR",
        help="write it as DIR/reproduce.md or DIR/reproduce_mome.md too",
    )
    parser.add_argument(
        "--write-data",
        type=Path,
        metavar="DIR",
        help="mixpert: write the images as folders SPLIT/DOMAIN/LABEL instead, for mixpert train",
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
    out = args.out or Path(f"{args.paper}-reproduce")
    if args.paper == "mome":
        _run_mome(args, out)
        return
    from mixpert_kernels.reproduce import run as runs

    if args.write_data is not None:
        runs.write_data(args.write_data, args.images, args.seed)
        return
    settings = runs.choose(args.quick, args.seeds)
    if args.pilot:
        runs.run_pilot(out, settings, args.processes)
    else:
        runs.reproduce(out, settings, args.processes, args.docs)


def _run_mome(args: argparse.Namespace, out: Path) -> None:
    for name in ("pilot", "write_data"):
        if getattr(args, name):
            option = name.replace("_", "-")
            raise ValueError(f"reproduce: {option} must go with mixpert, got it with mome")
    from mixpert_kernels.reproduce.mome import run as runs

    runs.reproduce(out, runs.choose(args.quick, args.seeds), args.processes, args.docs)
