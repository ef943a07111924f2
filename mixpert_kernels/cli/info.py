"""``mixpert info``: versions, devices, which backend serves each op and why not another, the extension."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import pkgutil
import platform
from pathlib import Path
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
    print(f"backends of the ops on {facts['machine']['device']}")
    rows = [["  op", "dtype", "takes", "not the others because"]]
    for op, dtypes in facts["ops"].items():
        for dtype, choice in dtypes.items():
            others = "; ".join(f"{name}: {reason}" for name, reason in choice["others"].items())
            rows.append([f"  {op}", dtype, choice["takes"], others])
    print_table(rows)
    print("\ncompiled extension")
    for line in _extension_lines(facts["extension"]):
        print(f"  {line}")


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

    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            gpus.append(f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}")
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "gpu": "; ".join(gpus) or "none that torch can use",
        "device": "cuda" if gpus else "cpu",
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _ops(device: str) -> dict[str, dict[str, dict[str, Any]]]:
    from mixpert_kernels import ops

    names = [module.name for module in pkgutil.iter_modules(ops.__path__)]
    return {
        name: {dtype: _choice(name, device, dtype) for dtype in DTYPES}
        for name in names
        if not name.startswith("_")
    }


def _choice(op: str, device: str, dtype: str) -> dict[str, Any]:
    """Which backend ``auto`` takes, and why not each other one."""
    import torch

    from mixpert_kernels.backends import BACKENDS, pick, why_not

    place = {"device": device, "dtype": getattr(torch, dtype)}
    takes = pick(op, "auto", **place).__name__.split(".")[-2]
    others = {
        name: why_not(op, name, **place) or f"can run it, but {takes} comes first"
        for name in BACKENDS
        if name != takes
    }
    return {"takes": takes, "others": others}


def _extension_lines(extension: dict[str, Any]) -> list[str]:
    if not extension["extension"]:
        return [f"none: {extension['reason']}", *extension["log_tail"].splitlines()]
    cuda = extension["cuda"]
    lines = [
        f"architectures {', '.join(extension['archs']) or 'none'}",
        f"nvcc {extension['nvcc']}, {extension['compiler']}",
        f"CUDA runtime {cuda['runtime']}, driver {cuda['driver'] or 'none'}",
    ]
    lines += [f"runs {gpu['code']} on {gpu['name']}" for gpu in cuda["devices"]]
    return lines + ([cuda["error"]] if cuda["error"] else [])
