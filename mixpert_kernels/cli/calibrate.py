"""``mixpert calibrate``: pick the routing threshold on labelled images."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .extras import require_extra
from .tables import print_table

if TYPE_CHECKING:
    from mixpert_kernels.training import Calibration

BATCH = 8
SHOWN = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "calibrate",
        help="pick the routing threshold on labelled images",
        description="Pick tau or delta on a folder that has a subfolder of images for each expert, by "
        "its name, and print accuracy and fallback for each threshold.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a saved tower")
    parser.add_argument("data", type=Path, metavar="DATA_DIR", help="one subfolder an expert")
    parser.add_argument(
        "--max-errors",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="accept so many images at a wrong expert that is not the versatile one (default: 0.05)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curve into this PNG")
    parser.add_argument("--out", type=Path, metavar="DIR", help="save the calibrated tower there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Calibrate, print the curve, and save where asked."""
    require_extra("PIL", *(["matplotlib"] if args.plot else []))
    _check(args)
    import torch

    from mixpert_kernels.hf.expert_names import names_of
    from mixpert_kernels.hf.loading import load_preprocessing, load_tower, quiet
    from mixpert_kernels.training.curve import draw_curve

    with quiet():
        tower = load_tower(args.checkpoint)
        preprocess = load_preprocessing(args.checkpoint, tower.config.vision_config)
        names = names_of(tower.config)
        files, labels = labelled_files(args.data, names)
        features = _features(tower, preprocess, files)
        result = tower.calibrate(features, torch.tensor(labels), max_errors=args.max_errors)
    name = "tau" if result.strategy.name == "score_threshold" else "delta"
    _print_curve(result, name, len(files))
    if args.plot:
        draw_curve(args.plot, result, name, names[0])
        print(f"plot      {args.plot}")
    if args.out:
        _save(args.checkpoint, args.out, {name: result.strategy.threshold})
        print(f"saved     {args.out}")
    else:
        print("nothing was saved: --out DIR does that")


def labelled_files(folder: Path, names: Sequence[str]) -> tuple[list[Path], list[int]]:
    """The image files below ``folder`` with the expert each subfolder is named after.

    Raises:
        ValueError: the folder is missing, or a subfolder is empty or has no expert's name.
    """
    from mixpert_kernels.demo.images import image_files

    if not folder.is_dir():
        raise ValueError(f"calibrate: DATA_DIR must be an existing directory, got {folder}")
    files: list[Path] = []
    labels: list[int] = []
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        if part.name not in names:
            raise ValueError(
                f"calibrate: subfolder must be named as one of {list(names)}, got {part}"
            )
        found = image_files(part)
        files += found
        labels += [names.index(part.name)] * len(found)
    if not files:
        raise ValueError(
            f"calibrate: DATA_DIR must hold a subfolder an expert, got none in {folder}"
        )
    return files, labels


def _features(tower: Any, preprocess: Any, files: Sequence[Path]) -> Any:
    import torch
    from tqdm import tqdm

    from mixpert_kernels.demo.images import open_image

    rows = []
    for i in tqdm(
        range(0, len(files), BATCH), desc="trunk features", unit="batch", leave=False, delay=1
    ):
        pixels = preprocess([open_image(path) for path in files[i : i + BATCH]])
        with torch.no_grad():
            rows.append(tower.router_features(pixels))
    return torch.cat(rows)


def _check(args: argparse.Namespace) -> None:
    if not 0 <= args.max_errors <= 1:
        raise ValueError(f"calibrate: --max-errors must lie in [0, 1], got {args.max_errors}")
    if args.plot and (args.plot.suffix.lower() != ".png" or not args.plot.parent.is_dir()):
        raise ValueError(
            f"calibrate: --plot must be a .png in an existing directory, got {args.plot}"
        )
    if args.out and args.out.is_file():
        raise ValueError(f"calibrate: --out must be a directory, got the file {args.out}")


def _print_curve(result: Calibration, name: str, images: int) -> None:
    rows = [[name, "accuracy", "fallback", "wrong expert"]]
    for point in result.curve:
        if any(abs(point.threshold - t) < 1e-6 for t in SHOWN):
            shares = (point.accuracy, point.fallback, point.errors)
            rows.append([f"{point.threshold:.2f}", *(f"{share:.1%}" for share in shares)])
    print_table(rows)
    best = result.chosen
    print(
        f"\nchosen    {name} = {result.strategy.threshold:g} on {images} images: accuracy {best.accuracy:.1%}, "
        f"fallback {best.fallback:.1%}, wrong expert {best.errors:.1%}"
    )


def _save(checkpoint: Path, out: Path, changes: dict[str, float]) -> None:
    """Copy the checkpoint with another threshold in its configuration, all or nothing."""
    from mixpert_kernels.hf.checkpoint import write_whole

    def write(draft: Path) -> None:
        shutil.copytree(checkpoint, draft, dirs_exist_ok=True)
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8")) | changes
        (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    write_whole(out, write)
