"""``mixpert train``: run a training recipe, or go on with one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .extras import require_extra


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "train",
        help="run a training recipe, from its last checkpoint where there is one",
        description="Run the stages of a TOML recipe in order, calibrate, save the tower and evaluate it. Started "
        "again, it goes on where it was stopped. For several processes: torchrun -m mixpert_kernels.cli train "
        "CONFIG.toml. docs/training.md describes the recipe.",
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.toml", help="the recipe")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bars")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Read the recipe, check it, and train."""
    from mixpert_kernels.training.recipe import Recipe

    recipe = Recipe.load(args.config)
    require_extra("PIL", extra="train")
    from mixpert_kernels.training.run import train

    train(recipe, progress=not args.no_progress)
