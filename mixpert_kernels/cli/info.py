"""``mixpert info``: versions, devices, which backend serves each op and why not another, the extension."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import pkgutil
import platform
from typing import Any

from .tables import print_table

PACKAGES = ("mixpert-kernels", "torch", "triton", "transformers")
DTYPES = ("float32", "bfloat16")


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "info", help="versions, devices, backends, the compiled extension"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print what is installed and what runs here."""
    facts = collect()
    if args.json:
        print(json.dumps(facts, indent=2))
        return
    for name in ("versions", "machine"):
        print(name)
        print_table([[f"  {key}", str(value)] for key, value in facts[name].items()])
        print()
    _print_choices(facts)
    print("\ncompiled extension")
    for line in _extension_lines(facts["extension"]):
        print(f"  {line}")


def _print_choices(facts: dict[str, Any]) -> None:
    """What auto takes; why not the others is said once where it is the same for all ops of a dtype."""
    print(f"backends of the ops on {facts['machine']['device']}: what auto takes")
    rows = [["  op", "dtype", "widths", "takes", "because"]]
    for op, dtypes in facts["ops"].items():
        for dtype, found in dtypes.items():
            for one in found["measured"]:
                widths = "x".join(map(str, one["widths"]))
                rows.append([f"  {op}", dtype, widths, one["takes"], one["because"]])
            others = "others" if found["measured"] else "any"
            rows.append([f"  {op}", dtype, others, found["takes"], found["because"]])
    print_table(rows)
    print("\nmeasurements")
    print_table([[f"  {name}", str(value)] for name, value in facts["measurements"].items()])
    print("\nwhy not another backend")
    calls: dict[tuple[str, str], list[str]] = {}
    for op, dtypes in facts["ops"].items():
        for dtype, found in dtypes.items():
            for other in found["others"].items():
                calls.setdefault(other, []).append(f"{op} {dtype}")
    for (name, reason), of in calls.items():
        every = all(name in found["others"] for d in facts["ops"].values() for found in d.values())
        alone = every and sum(name == other for other, _ in calls) == 1
        print(f"  {name}: {reason}{'' if alone else f': {_ops_of(of)}'}")


def _ops_of(calls: list[str]) -> str:
    """Ops with their dtypes, which go unsaid where they are all."""
    ops = dict.fromkeys(call.split()[0] for call in calls)
    dtypes = {op: [d for d in DTYPES if f"{op} {d}" in calls] for op in ops}
    return ", ".join(
        op if len(dtypes[op]) == len(DTYPES) else f"{op} {dtypes[op][0]}" for op in ops
    )


def collect() -> dict[str, Any]:
    """All facts, as JSON can hold them."""
    import torch

    from mixpert_kernels._build_info import build_info, cuda_facts

    versions = {"python": platform.python_version()}
    versions |= {name: _version(name) for name in PACKAGES}
    versions["torch"] = torch.__version__  # with its build, such as +cu130
    machine = _machine()
    extension = dataclasses.asdict(build_info()) | {"cuda": dataclasses.asdict(cuda_facts())}
    return {
        "versions": versions,
        "machine": machine,
        "ops": _ops(machine["device"]),
        "measurements": _measurements(machine["device"]),
        "extension": extension,
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pass
    if package == "mixpert-kernels":
        from mixpert_kernels import __version__

        return f"{__version__} (not installed, run from its source)"
    return "not installed"


def _machine() -> dict[str, Any]:
    import torch

    from mixpert_kernels.backends.choice import cpu_name

    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            gpus.append(f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}")
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "gpu": "; ".join(gpus) or "none that torch can use",
        "device": "cuda" if gpus else "cpu",
    }


def _ops(device: str) -> dict[str, dict[str, dict[str, Any]]]:
    from mixpert_kernels import ops

    names = [module.name for module in pkgutil.iter_modules(ops.__path__)]
    return {
        name: {dtype: _choice(name, device, dtype) for dtype in DTYPES}
        for name in names
        if not name.startswith("_")
    }


def _choice(op: str, device: str, dtype: str) -> dict[str, Any]:
    """Which backend ``auto`` takes, at widths that were measured and at others; and why not each other one."""
    import torch

    from mixpert_kernels.backends import BACKENDS, choice, why_not

    place = {"device": torch.device(device), "dtype": getattr(torch, dtype)}
    known = choice.table(place["device"]).measured.values()
    takes, because = _taken(op, **place, widths=())
    others = {
        name: why_not(op, name, **place) or f"can run it, but {takes} comes first"
        for name in BACKENDS
        if name != takes
    }
    measured = []
    for row in known:
        if (row.op, row.dtype) == (op, dtype):
            backend, reason = _taken(op, **place, widths=row.widths)
            measured.append({"widths": list(row.widths), "takes": backend, "because": reason})
    return {"takes": takes, "because": because, "measured": measured, "others": others}


def _taken(op: str, device: Any, dtype: Any, widths: tuple[int, ...]) -> tuple[str, str]:
    """What ``auto`` takes at some widths, and what that rests on."""
    from mixpert_kernels.backends import choice, pick, why_not

    takes = pick(op, "auto", device=device, dtype=dtype, widths=widths).__name__.split(".")[-2]
    first = choice.first(op, device, dtype, widths)
    reason = choice.reason(op, device, dtype, widths)
    if first is None:
        return takes, "the first that can run it"
    if first != takes:
        cannot = why_not(op, first, device=device, dtype=dtype)
        return takes, f"the next after {first}, which {cannot} ({reason})"
    return takes, str(reason)


def _measurements(device: str) -> dict[str, Any]:
    """Where stored measurements come from, or why there are none."""
    import os

    import torch

    from mixpert_kernels.backends import choice

    known = choice.table(torch.device(device))
    if os.environ.get("MIXPERT_BACKEND_TABLE") == "0":
        state = "ignored (MIXPERT_BACKEND_TABLE=0)"
    elif known.fault is not None:
        state = known.fault
    elif known.measured:
        state = f"{len(known.measured)} of this device with these versions"
    else:
        state = "none of this device with these versions: `mixpert tune` takes about a minute"
    return {"stored": state, "file": str(known.path) if known.path else None}


def _left_out(archs: list[str]) -> list[str]:
    if not archs:
        return []
    added = ", ".join(archs) + (
        " (with kernels of its own: wgmma and TMA)" if "90a" in archs else ""
    )
    return [f"MIXPERT_CUDA_ARCHS=all, before `pip install`, would add {added}"]


def _extension_lines(extension: dict[str, Any]) -> list[str]:
    if not extension["extension"]:
        return [f"none: {extension['reason']}", *extension["log_tail"].splitlines()]
    cuda = extension["cuda"]
    lines = [
        f"architectures {', '.join(extension['archs']) or 'none'}",
        f"nvcc {extension['nvcc']}, {extension['compiler']}",
        *_left_out(extension["left_out"]),
        f"CUDA runtime {cuda['runtime']}, driver {cuda['driver'] or 'none'}",
    ]
    lines += [f"runs {gpu['code']} on {gpu['name']}" for gpu in cuda["devices"]]
    return lines + ([cuda["error"]] if cuda["error"] else [])
