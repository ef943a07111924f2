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
        description="Run the stages of a TOML recipe in order, calibrate, save the tower, or the MoME model, and "
        "evaluate it. Started again, it goes on where it was stopped. For several processes: torchrun -m "
        "mixpert_kernels.cli train CONFIG.toml. docs/training.md describes the recipe, which names the model too.",
        usage="mixpert train [-h] [--no-progress] CONFIG.toml",
    )
    parser.add_argument("config", type=Path, nargs="?", metavar="CONFIG.toml", help="the recipe")
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)  # tried by analogy: refused
    parser.add_argument("--no-progress", action="store_true", help="show no progress bars")
    parser.set_defaults(run=run, fail=parser.error)


def run(args: argparse.Namespace) -> None:
    """Read the recipe, check it, and train."""
    from mixpert_kernels.training.recipe import Recipe

    _refuse_model(args)
    recipe = Recipe.load(args.config)
    require_extra("PIL", extra="train")
    from mixpert_kernels.training.run import train

    train(recipe, progress=not args.no_progress)


def _refuse_model(args: argparse.Namespace) -> None:
    """Say where the model belongs if it, and not a recipe, was given."""
    model = args.model
    if model is None and args.config is not None and args.config.is_dir():
        model = args.config
    if model is None:
        if args.config is None:
            args.fail("the following arguments are required: CONFIG.toml")
        return
    from mixpert_kernels.hf.heads import refuse_experts
    from mixpert_kernels.hf.loading import kind_of

    refuse_experts(model)
    whole = kind_of("train", model) == "mllm"
    raise ValueError(
        f'train: the model must be given in a recipe, as vision = "{model}" below [model] (docs/training.md)'
        + ("; for more than its vision tower and projector see docs/mllm.md, Training" * whole)
    )
