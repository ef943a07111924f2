"""``mixpert tune``: measure which backend is the fastest at a model's widths on this device; ``auto`` follows it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .tables import print_table

if TYPE_CHECKING:
    import torch

    from mixpert_kernels.hf.widths import Workload
    from mixpert_kernels.tuning import Report

DTYPES = ("float32", "float16", "bfloat16")
SIZES = ("hidden", "intermediate", "projected", "tokens")


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "tune",
        help="measure which backend is the fastest on this device",
        description="Time each op that a model calls, at its widths, by every backend that runs here and by a plain "
        "loop over the experts, in interleaved rounds. A backend whose result is wrong is named and not timed. The "
        "fastest for each op, dtype and widths, over all batches, goes to the user's cache directory, and 'auto' "
        "follows it on this device with these versions. Times are of calls that follow each other, launches included; "
        "--captured times CUDA graphs, for towers that are run by tower.capture.",
    )
    parser.add_argument(
        "model_dir",
        type=Path,
        nargs="?",
        metavar="MODEL_DIR",
        help="a tower or a vision checkpoint",
    )
    parser.add_argument(
        "--geometry", choices=("base", "so400m"), help="a SigLIP instead (default: so400m)"
    )
    for name in SIZES:
        parser.add_argument(f"--{name}", type=int, metavar="N", help="in place of the geometry's")
    parser.add_argument("--experts", type=int, metavar="N", help="(default: the tower's, or 4)")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="(default: bfloat16 on a GPU, float32 on a CPU)"
    )
    parser.add_argument("--device", metavar="NAME", help="such as cuda:1 (default: a GPU if any)")
    parser.add_argument(
        "--batches",
        type=int,
        nargs="+",
        metavar="N",
        help="tiles (default: 1 8 32, on a CPU 1 4)",
    )
    parser.add_argument(
        "--seconds", type=float, default=60.0, metavar="S", help="about how long (default: 60)"
    )
    parser.add_argument("--train", action="store_true", help="time backward as well")
    parser.add_argument("--captured", action="store_true", help="time CUDA graphs")
    parser.add_argument("--dry-run", action="store_true", help="store nothing")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure, print, and store.

    Raises:
        ValueError: an argument is wrong.
        OSError: the cache directory cannot be written; all is printed by then.
    """
    import torch

    from mixpert_kernels.backends import choice
    from mixpert_kernels.tuning import as_json, tune

    device = _device(args.device)
    gpu = device.type == "cuda"
    dtype = getattr(torch, args.dtype or ("bfloat16" if gpu else "float32"))
    facts = choice.identity(device)
    work = _workload(args, device.type)
    report = tune(
        work.calls,
        tokens=work.tokens,
        experts=work.experts,
        device=device,
        dtype=dtype,
        batches=args.batches or ((1, 8, 32) if gpu else (1, 4)),
        seconds=args.seconds,
        train=args.train,
        captured=args.captured,
        progress=not args.json,
    )
    if args.json:
        print(json.dumps(as_json(report, facts), indent=1))
    else:
        _print(report, facts, work)
    if args.dry_run:
        if not args.json:
            print("\nnothing was stored (--dry-run)")
        return
    path = choice.store(device, report.rows)
    if not args.json:
        print(f"\nstored in {path}; `mixpert info` shows what auto takes")


def _device(name: str | None) -> torch.device:
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"tune: --device must name a device, got {name}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"tune: --device must be a CPU or a GPU, got {name}")
    return device


def _workload(args: argparse.Namespace, device: str) -> Workload:
    from mixpert_kernels.hf import widths

    given = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    if args.model_dir is not None:
        if given or args.geometry:
            names = ", ".join(f"--{name}" for name in ("geometry", *SIZES))
            raise ValueError(f"tune: MODEL_DIR must come without {names}")
        found = widths.of_directory(args.model_dir, args.experts or 4, device)
        return found if args.experts is None else found._replace(experts=args.experts)
    sizes = widths.GEOMETRIES[args.geometry or "so400m"]._replace(**given)
    return widths.of_sizes(sizes, 4 if args.experts is None else args.experts, device)


def _print(report: Report, facts: dict[str, str], work: Workload) -> None:
    print_table([[name, value] for name, value in facts.items()])
    print(f"\nmilliseconds a call, {str(report.dtype).removeprefix('torch.')}, ", end="")
    print(f"{work.tokens} tokens a tile, {work.experts} experts")
    names = list(dict.fromkeys(name for t in report.timings for name in t.rounds))
    table = [["  op", "widths", "tiles", "pass", *names, "rounds", "fastest"]]
    for timing in report.timings:
        seconds = timing.seconds
        cells = [f"{1e3 * seconds[n]:.3g}" if n in seconds else "-" for n in names]
        rounds = max(map(len, timing.rounds.values()), default=0)
        fastest = min(seconds, key=seconds.__getitem__) if seconds else "-"
        own = [f"  {timing.call.op}", _widths(timing.call.widths), str(timing.batch)]
        table.append([*own, timing.direction, *cells, str(rounds), fastest])
    print_table(table)
    excluded = [
        [f"  {timing.call.op}", _widths(timing.call.widths), f"{timing.batch} tiles", name, reason]
        for timing in report.timings
        for name, reason in timing.excluded.items()
        if reason.startswith(("wrong", "fails", "no memory", "cannot be"))
    ]
    if excluded:
        print("\nnot timed, and not chosen")
        print_table([["  op", "widths", "at", "backend", "because"], *excluded])
    print("\nwhat auto takes from now on, and its time over that of the others (geometric mean)")
    chosen = [["  op", "widths", "takes", "of the time of"]]
    for row in report.rows:
        ratios = ", ".join(f"{name} {value:.2f}" for name, value in row.ratios.items())
        chosen.append([f"  {row.op}", _widths(row.widths), row.backend, ratios or "no other runs"])
    print_table(chosen)
    print(f"\n{report.seconds:.0f} s")


def _widths(widths: Sequence[int]) -> str:
    return "x".join(map(str, widths))
