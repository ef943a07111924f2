"""What a launch costs: programs a multiprocessor, matrix FLOPs issued and useful, bytes asked for and needed."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton import cdiv

from mixpert_kernels.backends.chips import blocks_a_multiprocessor

from ._catalogue import Geometry, Launch, segment
from ._compile import compile_launch, facts
from ._configs import Chip


def row(launch: Launch, chip: Chip) -> dict[str, Any]:
    """Compile a launch for a chip and say what it takes; one row of ``mixpert kernels``."""
    found = facts(compile_launch(launch.kernel, launch.args, launch.config, chip))
    warps = launch.config.num_warps
    registers, shared = found["registers"], found["shared_bytes"]
    blocks = blocks_a_multiprocessor(chip.arch, registers, shared, warps)
    return {
        "kernel": launch.kernel_name,
        "config": launch.label,
        "chip": chip.name,
        "default": launch.default,
        **found,
        "blocks_per_multiprocessor": blocks,
        "programs": math.prod(launch.grid),
        "triton": triton.__version__,
    }


def matrix_flops(launch: Launch, *, padded: bool) -> int:
    """FLOPs of the launch's matrix products; padded: with what is multiplied past the edges, as the hardware does."""
    product = _product(launch)
    if product is None:
        return 0
    total = 2 * product.batch
    for sizes, block in zip(product.sizes, product.blocks, strict=True):
        total *= sum(cdiv(n, block) * block if padded else n for n in sizes)
    return total


class _Product(NamedTuple):
    """Of each tile: the sizes, several where tensors lie side by side, and the blocks, of rows, columns and depth."""

    batch: int
    sizes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    blocks: tuple[int, int, int]
    operands: tuple[str, ...]  # the arguments that are multiplied


def _product(launch: Launch) -> _Product | None:
    """The product that a launch computes; None where there is none."""
    args, name = launch.args, launch.kernel_name
    if name == "grouped_outer":
        batch, tokens, depth = _sizes(args["x"])
        widths = tuple(args[f"WIDTH{i}"] for i in range(3))
        blocks = (args["BLOCK_K"], args["BLOCK_N"], args["BLOCK_T"])
        return _Product(batch, ((depth,), widths, (tokens,)), blocks, ("x", "z"))
    if "BLOCK_M" not in args:
        return None
    features = next(n for n in ("x", "dz", "x_ptr") if n in args)
    batch, tokens, _ = _sizes(args[features])
    weights = [n for n in ("w0", "w1", "w2") if args[n] is not None]
    n, k = _base(args["w0"]).shape[1:]
    several = len(weights)
    columns, depth = ((k,), (n,) * several) if name == "linear_dx" else ((n,) * several, (k,))
    blocks = (args["BLOCK_M"], args["BLOCK_N"], args["BLOCK_K"])
    return _Product(batch, ((tokens,), columns, depth), blocks, (features, *weights))


def _sizes(features: Any) -> tuple[int, int, int]:
    """(B, T, width); packed rows as one tile, for how they are divided no host knows."""
    shape = _base(features).shape
    return (1, *shape)[-3:]


def _base(operand: Any) -> Any:
    """The tensor behind a descriptor, or the argument itself."""
    return getattr(operand, "base", operand)


# Neither input nor output: what the programs of one launch tell each other.
WORKSPACES = {
    "route": ("workspace_ptr", "counters_ptr"),
    "route_grouped_linear": ("h_ptr", "workspace_ptr", "counters_ptr"),
}


def needed_bytes(launch: Launch) -> int:
    """Each input read once, each output written once."""
    return _bytes(launch, without=WORKSPACES.get(launch.kernel_name, ()))


def asked_bytes(launch: Launch) -> int:
    """What the programs ask memory for: operands once for each block that multiplies them; L2 answers most of it."""
    product = _product(launch)
    if product is None:
        return _bytes(launch)
    (rows,), columns, depth = product.sizes
    features = _base(launch.args[product.operands[0]])
    size = features.element_size()
    left = rows * sum(depth) * sum(cdiv(n, product.blocks[1]) for n in columns)
    right = cdiv(rows, product.blocks[0]) * sum(columns) * sum(depth)
    asked = product.batch * (left + right) * size + _bytes(launch, without=product.operands)
    if (
        launch.kernel_name == "route_grouped_linear"
    ):  # pooled and normalised; the products read the normalised rows
        asked += 2 * features.numel() * size
    return asked


def _bytes(launch: Launch, without: tuple[str, ...] = ()) -> int:
    tensors = {id(_base(v)): _base(v) for n, v in launch.args.items() if n not in without}
    return sum(t.numel() * t.element_size() for t in tensors.values() if isinstance(t, Tensor))


def segment_costs(chip: Chip, geometry: Geometry | None = None) -> list[dict[str, Any]]:
    """The launches of one forward pass of the expert segment, in bfloat16; attention, PyTorch's own, is left out."""
    return [
        {
            "chip": chip.name,
            "call": launch.call,
            "kernel": launch.kernel_name,
            "config": launch.label,
            "programs": math.prod(launch.grid),
            "useful_flops": matrix_flops(launch, padded=False),
            "issued_flops": matrix_flops(launch, padded=True),
            "needed_bytes": needed_bytes(launch),
            "asked_bytes": asked_bytes(launch),
        }
        for launch in segment(chip, geometry or Geometry())
    ]
