"""``mixpert convert``: a transformers checkpoint becomes a tower, or a whole model, of untrained experts."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

PREPROCESSING = ("preprocessor_config.json", "processor_config.json")
TEXTS = (".json", ".txt", ".jinja", ".model")  # processor, tokenizer, chat template, generation


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "convert", help="make a tower of a transformers vision checkpoint"
    )
    parser.add_argument("model_dir", type=Path, metavar="MODEL_DIR", help="a checkpoint directory")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where the tower goes"
    )
    parser.add_argument("--experts", type=int, default=4, metavar="N", help="(default: 4)")
    parser.add_argument(
        "--layers",
        type=int,
        default=2,
        metavar="N",
        help="how many last layers get experts (default: 2)",
    )
    parser.add_argument(
        "--feature-layer",
        type=int,
        default=-1,
        metavar="N",
        help="the hidden state to use (default: -1)",
    )
    parser.add_argument(
        "--projector-dim",
        type=int,
        metavar="N",
        help="add a new random projector Linear-GELU-Linear of this width (default: the model's own, if any)",
    )
    parser.add_argument("--expert-names", metavar="A,B,...", help="one name an expert, by commas")
    parser.add_argument(
        "--whole",
        action="store_true",
        help="keep the language model: give a vision-language model its experts in place",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Convert and save, all or nothing."""
    _check(args)
    if args.whole:
        _run_whole(args)
        return
    import torch

    from mixpert_kernels import FusedMixpertTower
    from mixpert_kernels.hf.checkpoint import write_whole
    from mixpert_kernels.hf.loading import load_vision_model, quiet

    names = _names(args)
    with quiet():
        vision, projector = load_vision_model(args.model_dir)
        torch.manual_seed(0)  # the router and a new projector start from the same numbers each time
        if args.projector_dim is not None:
            projector = _new_projector(vision, args.projector_dim)
        tower = FusedMixpertTower.from_vision_model(
            vision,
            projector,
            num_experts=args.experts,
            expert_layers=args.layers,
            feature_layer=args.feature_layer,
            expert_names=names,
        )

        def write(draft: Path) -> None:
            tower.save_pretrained(draft)
            for name in PREPROCESSING:
                if (args.model_dir / name).is_file():
                    shutil.copyfile(args.model_dir / name, draft / name)

        write_whole(args.out, write)
    millions = sum(parameter.numel() for parameter in tower.parameters()) / 1e6
    print(
        f"{args.out}: {args.experts} experts of the last {args.layers} layers of a "
        f"{vision.config.model_type}, {millions:.1f} M parameters"
    )
    print(_ADVICE)


def _run_whole(args: argparse.Namespace) -> None:
    import torch

    from mixpert_kernels.hf.checkpoint import write_whole
    from mixpert_kernels.hf.loading import quiet
    from mixpert_kernels.hf.mllm import mixpertize
    from mixpert_kernels.hf.mllm.saving import load_plain

    with quiet():
        model = load_plain(args.model_dir)
        torch.manual_seed(0)
        mixpertize(model, args.experts, args.layers, expert_names=_names(args))

        def write(draft: Path) -> None:
            model.save_pretrained(draft)
            for path in args.model_dir.iterdir():
                weights = path.name.endswith(".index.json") or path.name == "config.json"
                if path.is_file() and path.suffix in TEXTS and not weights:
                    shutil.copyfile(path, draft / path.name)

        write_whole(args.out, write)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(
        f"{args.out}: {args.experts} experts of {args.layers} vision layers and the projector of a "
        f"{model.config.model_type}, {millions:.1f} M parameters"
    )
    print(_ADVICE)


_ADVICE = "the experts are clones and the router is random: train them before you route by them"


def _names(args: argparse.Namespace) -> list[str] | None:
    return args.expert_names.split(",") if args.expert_names else None


def _check(args: argparse.Namespace) -> None:
    config = args.out / "config.json"
    if args.out.exists() and args.out.resolve() == args.model_dir.resolve():
        raise ValueError(f"convert: --out must not be the model's own directory, got {args.out}")
    if args.out.is_file():
        raise ValueError(f"convert: --out must be a directory, got the file {args.out}")
    if args.whole and (args.projector_dim is not None or args.feature_layer != -1):
        raise ValueError(
            "convert: --whole must come without --projector-dim and --feature-layer: the model has its own"
        )
    if config.is_file() and not _is_ours(config, args.whole):
        raise ValueError(f"convert: --out must not hold another model, got {args.out}")
    if args.projector_dim is not None and args.projector_dim < 1:
        raise ValueError(f"convert: --projector-dim must be at least 1, got {args.projector_dim}")


def _is_ours(config: Path, whole: bool) -> bool:
    """Whether a configuration is of what this command has made before."""
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
        return "mixpert" in found if whole else found.get("model_type") == "mixpert_vision"
    except (ValueError, AttributeError, TypeError):
        return False


def _new_projector(vision: Any, width: int) -> Any:
    from torch import nn

    like = next(vision.parameters())
    first = nn.Linear(vision.config.hidden_size, width)
    return nn.Sequential(first, nn.GELU(), nn.Linear(width, width)).to(like.dtype)
