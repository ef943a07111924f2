"""route_grouped_linear in one launch (and one memset): blocks that wait for none that starts after them."""

from __future__ import annotations

from torch import Tensor

from mixpert_kernels.backends.reference.route_grouped_linear import three_ops

from . import _configs, _launch, _tickets
from ._operands import Rows, cdiv
from .grouped_layer_norm import grouped_layer_norm
from .grouped_linear import grouped_linear
from .route import place_counters, route, router_arguments

# Of wgmma's blocks, above which three launches serve: tickets multiply by one warpgroup a block, without TMA, and fill
# the tensor cores less. Both ways give the same bits. Not measured; one image of SigLIP-so400m has 1.2 on an H100.
MOST_WAVES = 2


def route_grouped_linear(
    x: Tensor,  # (B, T, D)
    cu_seqlens: Tensor | None,  # (B + 1,) int32
    image_of_tile: Tensor | None,  # (B,)
    base_tile: Tensor | None,  # (I,)
    expert: Tensor | None,  # (I,) forced
    router_norm_weight: Tensor,  # (D,)
    router_norm_bias: Tensor,
    router_hidden_weight: Tensor | None,  # (h, D)
    router_hidden_bias: Tensor | None,
    router_weight: Tensor,  # (E, D or h)
    router_bias: Tensor,  # (E,)
    router_eps: float,
    strategy: str,
    threshold: float,
    against: str,
    norm_weight: Tensor,  # (E, D)
    norm_bias: Tensor | None,
    norm_eps: float,
    weights: list[Tensor],  # each (E, N_i, D)
    biases: list[Tensor],  # each (E, N_i), or empty
    activation: str,
) -> tuple[Tensor, ...]:  # y (B, T, N), scores (I, E), expert, order, offsets
    tiles = (image_of_tile, base_tile, expert)
    router = (
        router_norm_weight,
        router_norm_bias,
        router_hidden_weight,
        router_hidden_bias,
        router_weight,
        router_bias,
    )
    rule = (router_eps, strategy, threshold, against)
    name = f"route_grouped_linear_{_configs.SUFFIX[x.dtype]}"
    packed = cu_seqlens is not None
    wgmma = not packed and _tickets.multiplies_by_wgmma(x, weights)
    many = wgmma and _tickets.waves(x, weights) > MOST_WAVES
    if packed or many or not _tickets.serves(f"{name}_small", x, weights):
        layer = (norm_weight, norm_bias, norm_eps, weights, biases, activation)
        separate = (route, grouped_layer_norm, grouped_linear)
        return three_ops(*separate, x, cu_seqlens, *tiles, *router, *rule, *layer)
    x, weights = _tickets.prepared(x, weights)
    blocks = _tickets.output_blocks(x, weights)
    kernel = f"{name}_wgmma" if wgmma else _configs.of_size(name, x.device, blocks)
    args = _tickets.arguments(x, norm_weight, norm_bias, norm_eps, weights, biases, activation)
    rows = Rows.of(x, None)
    routing, routed = router_arguments(kernel, x, rows, tiles, router, rule)
    facts, (batch, tokens, _) = _launch.kernels()[kernel].constants, x.shape
    images = routed["scores"].shape[0]
    counters = _tickets.zeros(x, 2 * images + 2 + _tickets.row_blocks(x, facts))
    args |= routing | place_counters(counters, images)
    args |= {"ticket": counters[2 * images + 1 :], "ready": counters[2 * images + 2 :]}
    pools = images * cdiv(tokens, facts["pool_rows"])
    norms = batch * cdiv(tokens, facts["norm_rows"])
    _launch.launch(kernel, pools + norms + blocks(facts), args)
    return args["y"], routed["scores"], routed["expert"], routed["order"], routed["offsets"]
