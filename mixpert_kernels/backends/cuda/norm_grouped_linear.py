"""norm_grouped_linear: one launch (and one memset) below one wave of blocks, and the two of its ops above."""

from __future__ import annotations

from torch import Tensor

from mixpert_kernels.backends.reference.norm_grouped_linear import two_ops

from . import _configs, _launch, _tickets
from ._operands import cdiv
from .grouped_layer_norm import grouped_layer_norm
from .grouped_linear import grouped_linear


def norm_grouped_linear(
    x: Tensor,  # (B, T, K)
    norm_weight: Tensor,  # (E, K)
    norm_bias: Tensor | None,
    norm_eps: float,
    weights: list[Tensor],  # each (E, N_i, K)
    biases: list[Tensor],  # each (E, N_i), or empty
    expert: Tensor,  # (B,) int32
    order: Tensor,
    offsets: Tensor,
    cu_seqlens: Tensor | None,  # (B + 1,) int32
    activation: str,
) -> Tensor:  # (B, T, N)
    """Both ways give the same bits, so that the choice may depend on the batch.

    Below one wave the LayerNorm's launch and the idle end of it cost more than blocks that wait for their rows.
    """
    ids, packed = (expert, order, offsets, cu_seqlens), cu_seqlens is not None
    wgmma = not packed and _tickets.multiplies_by_wgmma(x, weights)
    kernel = f"norm_grouped_linear_{_configs.SUFFIX[x.dtype]}_{'wgmma' if wgmma else 'small'}"
    if packed or not (_tickets.serves(kernel, x, weights) and _below_one_wave(x, weights)):
        layer = (norm_weight, norm_bias, norm_eps, weights, biases)
        return two_ops(grouped_layer_norm, grouped_linear, x, *layer, *ids, activation)
    x, weights = _tickets.prepared(x, weights)
    args = _tickets.arguments(x, norm_weight, norm_bias, norm_eps, weights, biases, activation)
    facts = _launch.kernels()[kernel].constants
    counters = _tickets.zeros(x, 1 + _tickets.row_blocks(x, facts))
    args |= {"ticket": counters[:1], "ready": counters[1:]}
    args |= {"expert": expert, "batch": x.shape[0]}
    norms = x.shape[0] * cdiv(x.shape[1], facts["norm_rows"])
    _launch.launch(kernel, norms + _tickets.output_blocks(x, weights)(facts), args)
    return args["y"]


def _below_one_wave(x: Tensor, weights: list[Tensor]) -> bool:
    """Whether the linear layer's large blocks would leave multiprocessors without work, or it takes its small ones."""
    if _tickets.multiplies_by_wgmma(x, weights):
        return _tickets.waves(x, weights) < 1
    name = f"grouped_linear_{_configs.SUFFIX[x.dtype]}"
    blocks = _tickets.output_blocks(x, weights)
    return _configs.of_size(name, x.device, blocks).endswith("_small")
