"""``mixpert route``: which expert each image goes to."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .extras import require_extra
from .tables import print_table

BATCH = 8


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser("route", help="the expert and the scores of each image")
    parser.add_argument(
        "checkpoint", type=Path, metavar="DIR_OR_CHECKPOINT", help="a saved tower, or a file in it"
    )
    parser.add_argument(
        "images", type=Path, nargs="+", metavar="IMAGES", help="image files, or folders of them"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Route the images and print where they go."""
    require_extra("PIL")
    from mixpert_kernels.demo.images import image_files
    from mixpert_kernels.hf.loading import quiet

    paths = [p for path in args.images for p in (image_files(path) if path.is_dir() else [path])]
    with quiet():
        names, rows = route_files(args.checkpoint, paths)
    if args.json:
        report = {"checkpoint": str(args.checkpoint), "experts": names, "images": rows}
        print(json.dumps(report, indent=2))
        return
    table = [["image", "expert", *names]]
    table += [
        [row["image"], row["name"], *(f"{score:.3f}" for score in row["scores"].values())]
        for row in rows
    ]
    print_table(table)


def route_files(checkpoint: Path, paths: Sequence[Path]) -> tuple[list[str], list[dict[str, Any]]]:
    """Route image files through a saved tower.

    Args:
        checkpoint: its directory, or a file in it.
        paths: the images.

    Returns:
        The experts' names, and for each image its path, expert, the expert's name, and the scores.

    Raises:
        ValueError: the tower or an image cannot be read.
    """
    import torch
    from tqdm import tqdm

    from mixpert_kernels.demo.images import open_image
    from mixpert_kernels.hf.loading import load_preprocessing, load_tower

    directory = checkpoint.parent if checkpoint.is_file() else checkpoint
    for path in paths:
        if not path.is_file():
            raise ValueError(f"route: image must be an existing file, got {path}")
    tower = load_tower(directory)
    preprocess = load_preprocessing(directory, tower.config.vision_config)
    names = tower.config.expert_names or [f"expert {k}" for k in range(tower.config.num_experts)]
    rows = []
    starts = range(0, len(paths), BATCH)
    for i in tqdm(
        starts, desc="routing", unit="batch", leave=False, delay=1, disable=len(starts) < 2
    ):
        part = paths[i : i + BATCH]
        pixels = preprocess([open_image(path) for path in part])
        with torch.inference_mode():
            routing = tower.route(tower.trunk_features(pixels))
        scores_of = routing.scores.tolist() if routing.scores is not None else []
        for path, expert, scores in zip(part, routing.expert.tolist(), scores_of, strict=True):
            by_name = dict(zip(names, scores, strict=True))
            rows.append(
                {"image": str(path), "expert": expert, "name": names[expert], "scores": by_name}
            )
    return names, rows
