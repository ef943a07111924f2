"""``mixpert demo``: the main job on real images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .extras import require_extra


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "demo",
        help="route photographs, charts and documents in one forward; write a picture",
        description="Build a tower, train its router on generated images, route other images in one "
        "forward, write a picture and print the accuracy and the times.",
    )
    parser.add_argument(
        "--geometry",
        choices=("tiny", "base", "so400m"),
        default="tiny",
        help="sizes of the SigLIP-type tower with random weights (default: tiny, D = 192)",
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="PATH",
        help="a transformers vision checkpoint to use instead; or a tower or vision-language model that has "
        "experts, shown with its own router and expert names",
    )
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="route the images of this folder instead"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("mixpert-demo.png"), help="(default: %(default)s)"
    )
    parser.add_argument("--experts", type=int, metavar="N", help="1 to 8 (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and images (default: 0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the demo."""
    require_extra("matplotlib", "PIL", "skimage")
    from mixpert_kernels.demo.run import DemoOptions, run_demo
    from mixpert_kernels.hf.loading import quiet

    options = DemoOptions(
        geometry=args.geometry,
        model=args.model,
        images=args.images,
        out=args.out,
        experts=args.experts,
        seed=args.seed,
    )
    with quiet():
        run_demo(options)
