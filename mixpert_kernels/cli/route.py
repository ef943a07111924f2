"""``mixpert route``: which expert each image goes to, or which experts each instruction asks for."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .extras import require_extra
from .tables import print_table

BATCH = 8


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "route",
        help="the expert and the scores of each image, or of each instruction",
        description="Print the expert and the scores of each image, by a saved tower or a vision-language model "
        "with experts, of which only the vision side is loaded. For a MoME model, print each instruction's weights of "
        "the vision experts and its adapter in each layer; only the routers and the sentence encoder are loaded.",
        usage="mixpert route [-h] [--json] (DIR | --model DIR) IMAGES [IMAGES ...]\n"
        "       mixpert route [-h] [--json] (DIR | --model DIR) --instruction TEXT [TEXT ...] [--sentence-encoder DIR]",
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        nargs="?",
        metavar="DIR",
        help="a saved tower or model, or a file in it",
    )
    parser.add_argument(
        "images", type=Path, nargs="*", metavar="IMAGES", help="image files, or folders of them"
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="the same as DIR in front")
    parser.add_argument(
        "--instruction",
        nargs="+",
        action="extend",
        metavar="TEXT",
        help="for a MoME model: texts as a user would ask",
    )
    parser.add_argument(
        "--sentence-encoder",
        type=Path,
        metavar="DIR",
        help="in the place of the MoME model's, such as a directory of all-MiniLM-L6-v2",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run, fail=parser.error)


def run(args: argparse.Namespace) -> None:
    """Route the images, or the instructions, and print where they go."""
    if args.instruction:
        _run_instructions(args)
        return
    if args.sentence_encoder:
        args.fail("--sentence-encoder is for --instruction")
    require_extra("PIL")
    from mixpert_kernels.demo.images import image_files
    from mixpert_kernels.hf.loading import quiet

    checkpoint, images = args.model or args.checkpoint, args.images
    if args.model and args.checkpoint:
        images = [args.checkpoint, *images]
    if checkpoint is None or not images:
        args.fail("the following arguments are required: IMAGES, or --instruction of a MoME model")
    paths = [p for path in images for p in (image_files(path) if path.is_dir() else [path])]
    with quiet():
        names, rows = route_files(checkpoint, paths)
    if args.json:
        report = {"checkpoint": str(checkpoint), "experts": names, "images": rows}
        print(json.dumps(report, indent=2))
        return
    table = [["image", "expert", *names]]
    table += [
        [row["image"], row["name"], *(f"{score:.3f}" for score in row["scores"].values())]
        for row in rows
    ]
    print_table(table)


def _run_instructions(args: argparse.Namespace) -> None:
    from mixpert_kernels.hf import mome

    if args.images or (args.model and args.checkpoint):
        args.fail("--instruction takes no IMAGES: weights and adapters do not depend on them")
    if not (args.model or args.checkpoint):
        args.fail("the following arguments are required: DIR")
    given = args.model or args.checkpoint
    directory = given.parent if given.is_file() else given
    found = mome.route(directory, args.instruction, sentence_encoder=args.sentence_encoder)
    every = zip(
        args.instruction,
        *(t.tolist() for t in (found.weights, found.experts, found.scores)),
        strict=True,
    )
    rows = [
        {
            "instruction": text,
            "weights": dict(zip(found.branches, weights, strict=True)),
            "experts": experts,
            "scores": scores,
        }
        for text, weights, experts, scores in every
    ]
    if args.json:
        report = {"checkpoint": str(given), "branches": found.branches, "instructions": rows}
        print(json.dumps(report, indent=2))
        return
    layers = [f"layer {n}" for n in range(found.experts.shape[1])]
    table = [["instruction", *found.branches, *layers]]
    for row in rows:
        weights = [f"{weight:.3f}" for weight in row["weights"].values()]
        table.append([row["instruction"], *weights, *map(str, row["experts"])])
    print_table(table)


def route_files(checkpoint: Path, paths: Sequence[Path]) -> tuple[list[str], list[dict[str, Any]]]:
    """Route image files through a saved tower, or through the vision side of a model with experts.

    Args:
        checkpoint: its directory, or a file in it.
        paths: the images.

    Returns:
        The experts' names, and for each image its path, expert, the expert's name, and the scores.

    Raises:
        ValueError: the model or an image cannot be read.
    """
    from mixpert_kernels.hf.loading import kind_of
    from mixpert_kernels.hf.mome import is_saved

    directory = checkpoint.parent if checkpoint.is_file() else checkpoint
    for path in paths:
        if not path.is_file():
            raise ValueError(f"route: image must be an existing file, got {path}")
    if is_saved(directory):
        raise ValueError(
            f"route: a MoME model must be asked with --instruction, which its routers read, got images for {directory}"
        )
    whole = kind_of("route", directory) in ("mixpertized", "mllm")
    names, routes = (_by_model if whole else _by_tower)(directory, paths)
    rows = []
    for path, (expert, scores) in zip(paths, routes, strict=True):
        by_name = dict(zip(names, scores, strict=True))
        rows.append(
            {"image": str(path), "expert": expert, "name": names[expert], "scores": by_name}
        )
    return names, rows


Routes = Iterator[tuple[int, list[float]]]  # of each image: its expert and the scores


def _by_tower(directory: Path, paths: Sequence[Path]) -> tuple[list[str], Routes]:
    import torch

    from mixpert_kernels.demo.images import open_image
    from mixpert_kernels.hf.expert_names import names_of
    from mixpert_kernels.hf.loading import load_preprocessing, load_tower

    tower = load_tower(directory)
    preprocess = load_preprocessing(directory, tower.config.vision_config)

    def routes() -> Routes:
        for i in _bar(range(0, len(paths), BATCH), "batch"):
            pixels = preprocess([open_image(path) for path in paths[i : i + BATCH]])
            with torch.inference_mode():
                routing = tower.route(tower.trunk_features(pixels))
            assert routing.scores is not None  # a router that was asked has scores
            yield from zip(routing.expert.tolist(), routing.scores.tolist(), strict=True)

    return names_of(tower.config), routes()


def _by_model(directory: Path, paths: Sequence[Path]) -> tuple[list[str], Routes]:
    from mixpert_kernels.demo.images import open_image
    from mixpert_kernels.hf.expert_names import names_of
    from mixpert_kernels.hf.mllm.vision_side import ImageReader, load_vision_side, route_image

    model = load_vision_side(directory)
    read = ImageReader(directory)

    def routes() -> Routes:
        for path in _bar(paths, "image"):
            record = route_image(model, read(open_image(path)))
            yield int(record.expert), record.scores[0].tolist()

    return names_of(model.base_model.mixpert_settings), routes()


def _bar(steps: Sequence[Any], unit: str) -> Any:
    from tqdm import tqdm

    alone = len(steps) < 2
    return tqdm(steps, desc="routing", unit=unit, leave=False, delay=1, disable=alone)
