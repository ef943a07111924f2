"""``mixpert convert``: a transformers checkpoint gets untrained experts.

Of a vision model it makes a tower. A vision-language model stays whole, with its experts in place.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

PREPROCESSING = ("preprocessor_config.json", "processor_config.json")
TEXTS = (".json", ".txt", ".jinja", ".model")  # processor, tokenizer, chat template, generation
TEMPLATES = "additional_chat_templates"
EXPERTS = 4


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "convert",
        help="give a transformers vision or vision-language checkpoint experts",
        description="Give a checkpoint untrained experts. A vision model becomes a FusedMixpertTower. A "
        "vision-language model stays whole, with experts in its vision tower and projector, and keeps its "
        "processor, tokenizer, chat template and generation config.",
    )
    parser.add_argument("model_dir", type=Path, metavar="MODEL_DIR", help="a checkpoint directory")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where it goes")
    parser.add_argument(
        "--experts",
        type=int,
        metavar="N",
        help=f"(default: as many as --expert-names, or {EXPERTS})",
    )
    parser.add_argument(
        "--expert-names",
        metavar="A,B,...",
        help="different names by commas; the first expert also takes images that the router is unsure of",
    )
    parser.add_argument(
        "--layers",
        type=int,
        default=2,
        metavar="N",
        help="how many last layers get experts (default: 2)",
    )
    parser.add_argument(
        "--tower",
        action="store_true",
        help="of a vision-language model, take the vision model and the projector alone",
    )
    parser.add_argument(
        "--feature-layer",
        type=int,
        default=-1,
        metavar="N",
        help="the hidden state that a tower uses (default: -1)",
    )
    parser.add_argument(
        "--projector-dim",
        type=int,
        metavar="N",
        help="give a tower a new random projector Linear-GELU-Linear of this width (default: the model's own, if any)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Convert and save, all or nothing."""
    from mixpert_kernels.hf.loading import kind_of, quiet

    names, experts = _names(args)
    with quiet():
        whole = kind_of("convert", args.model_dir) in ("mllm", "mixpertized") and not args.tower
        _check(args, whole)
        (_convert_whole if whole else _convert_tower)(args, names, experts)
    if names is not None:
        print(
            f"names: {', '.join(names)}; {names[0]} also takes images that the router is unsure of"
        )
    print("the experts are clones and the router is random: train them before you route by them")


def _convert_tower(args: argparse.Namespace, names: list[str] | None, experts: int) -> None:
    import torch

    from mixpert_kernels import FusedMixpertTower
    from mixpert_kernels.hf.checkpoint import write_whole
    from mixpert_kernels.hf.loading import load_vision_model

    vision, projector = load_vision_model(args.model_dir)
    torch.manual_seed(0)  # the router and a new projector start from the same numbers each time
    if args.projector_dim is not None:
        projector = _new_projector(vision, args.projector_dim)
    tower = FusedMixpertTower.from_vision_model(
        vision,
        projector,
        num_experts=experts,
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
    print(
        f"{args.out}: {experts} experts of the last {args.layers} layers of a "
        f"{vision.config.model_type}, {_millions(tower)} M parameters"
    )


def _convert_whole(args: argparse.Namespace, names: list[str] | None, experts: int) -> None:
    import torch

    from mixpert_kernels.hf.checkpoint import write_whole
    from mixpert_kernels.hf.mllm import mixpertize
    from mixpert_kernels.hf.mllm.saving import load_plain

    model = load_plain(args.model_dir)
    torch.manual_seed(0)
    mixpertize(model, experts, args.layers, expert_names=names)

    def write(draft: Path) -> None:
        model.save_pretrained(draft)
        for path in args.model_dir.iterdir():
            weights = path.name.endswith(".index.json") or path.name == "config.json"
            if path.is_file() and path.suffix in TEXTS and not weights:
                shutil.copyfile(path, draft / path.name)
        if (args.model_dir / TEMPLATES).is_dir():
            shutil.copytree(args.model_dir / TEMPLATES, draft / TEMPLATES)

    write_whole(args.out, write)
    print(
        f"{args.out}: {experts} experts of {args.layers} vision layers and the projector of a "
        f"{model.config.model_type}, {_millions(model)} M parameters"
    )


def _millions(model: Any) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f}"


def _names(args: argparse.Namespace) -> tuple[list[str] | None, int]:
    """The experts' names, where they are given, and how many experts there shall be."""
    from mixpert_kernels.hf.expert_names import are_names

    if args.expert_names is None:
        return None, EXPERTS if args.experts is None else args.experts
    names = [name.strip() for name in args.expert_names.split(",")]
    experts = len(names) if args.experts is None else args.experts
    if not are_names(names, experts):
        raise ValueError(
            f"convert: --expert-names must be {experts} different names, none of them blank, got {args.expert_names!r}"
        )
    return names, experts


def _check(args: argparse.Namespace, whole: bool) -> None:
    config = args.out / "config.json"
    if args.out.exists() and args.out.resolve() == args.model_dir.resolve():
        raise ValueError(f"convert: --out must not be the model's own directory, got {args.out}")
    if args.out.is_file():
        raise ValueError(f"convert: --out must be a directory, got the file {args.out}")
    if whole and (args.projector_dim is not None or args.feature_layer != -1):
        raise ValueError(
            "convert: --projector-dim and --feature-layer must come with --tower: a vision-language model has its own"
        )
    if config.is_file() and not _is_ours(config, whole):
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
