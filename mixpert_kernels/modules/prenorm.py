"""The fused plan of pre-LN ViT blocks.

    x = x + scale1 * out(attention(qkv(norm1(x))))
    x = x + scale2 * fc2(act(fc1(norm2(x))))

Seven launches whatever the number of experts: LayerNorm, QKV (one product), attention, output projection (with bias,
scale and residual), LayerNorm, and the MLP's two (bias and activation; bias, scale and residual). Five where the
backend puts a LayerNorm and the product that follows into one. The same plan serves a shared block, with plain leaves
and one expert, and an expertized one: it reads the parameters where they are.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mixpert_kernels.backends import pick
from mixpert_kernels.backends.cpu.native import compute_dtype
from mixpert_kernels.ops import RouterWeights, Strategy
from mixpert_kernels.routing import Routing

from .leaves import (
    activation_name,
    exists,
    get,
    is_hooked,
    is_plain,
    layer_norm,
    linear,
    mlp,
    norm_linear,
    routed_linear,
)


@dataclass(frozen=True)
class PreNormPlan:
    """Where the roles of a pre-LN block are: a dotted path each, below the block."""

    norm1: str
    query: str
    key: str
    value: str
    out: str
    norm2: str
    fc1: str
    fc2: str
    activation: str
    heads: str
    scale1: str | None = None  # LayerScale: path of the parameter
    scale2: str | None = None

    @staticmethod
    def of(block: nn.Module) -> PreNormPlan | None:
        """Return the plan of a known block; None for any other, whose own forward then runs."""
        name = type(block).__name__.removeprefix("Parametrized")  # by its own loose parameters
        for plan in PLANS.get(name, ()):
            if plan._fits(block):
                return plan
        return None

    def _fits(self, block: nn.Module) -> bool:
        paths = [getattr(self, f.name) for f in fields(self)]
        return (
            all(path is None or exists(block, path) for path in paths)
            and self._reads_all(block)
            and all(is_plain(leaf) for leaf in self._leaves(block))
            and len({leaf.bias is None for leaf in self._leaves(block)[1:4]}) == 1
            and activation_name(get(block, self.activation)) is not None
        )

    def _reads_all(self, block: nn.Module) -> bool:
        """Whether the block has no parameter besides: such as a query's norm, which its own forward would apply."""
        scales = sum(path is not None for path in (self.scale1, self.scale2))
        read = sum(len(list(leaf.parameters())) for leaf in self._leaves(block)) + scales
        return read == len(list(block.parameters()))

    def serves(self, block: nn.Module, args: tuple = (), kwargs: dict | None = None) -> bool:
        """Whether the plan computes what the block's own forward would, for this call.

        Not when a leaf or the activation was replaced or any module hooked since (LoRA, offloading), with an attention
        mask or any other argument that is not None, nor when dropout or stochastic depth is at work.
        """
        if any(a is not None for a in (*args, *(kwargs or {}).values())):
            return False
        if any(is_hooked(module) for module in block.modules()):
            return False
        if not all(is_plain(leaf) for leaf in self._leaves(block)):
            return False
        if activation_name(get(block, self.activation)) is None:
            return False
        return not (block.training and _drops(block))

    def _leaves(self, block: nn.Module) -> list[nn.Module]:
        roles = (self.norm1, self.query, self.key, self.value, self.out)
        return [get(block, path) for path in (*roles, self.norm2, self.fc1, self.fc2)]

    def run(self, block: nn.Module, x: Tensor, routing: Routing) -> Tensor:
        """Run the block on x (B, T, D)."""
        dtype = x.dtype
        if x.device.type == "cpu" and not torch.is_grad_enabled():
            x = x.to(compute_dtype(dtype))  # once a block rather than around each product
        norm1, query, key, value = self._leaves(block)[:4]
        qkv = norm_linear(x, norm1, (query, key, value), routing)  # (B, T, 3D)
        return self._run_from(qkv, block, x, routing).to(dtype)

    def run_routed(
        self, block: nn.Module, x: Tensor, router: RouterWeights, strategy: Strategy, **options: Any
    ) -> tuple[Tensor, Routing]:
        """Route x (B, T, D) and run the block: the router, the first norm and QKV are one ``route_grouped_linear``.

        ``options``: its keyword arguments for images and the router.
        """
        norm1, query, key, value = self._leaves(block)[:4]
        qkv, routing = routed_linear(x, router, strategy, norm1, (query, key, value), **options)
        return self._run_from(qkv, block, x, routing), routing

    def _run_from(self, qkv: Tensor, block: nn.Module, x: Tensor, routing: Routing) -> Tensor:
        out, norm2, fc1, fc2 = self._leaves(block)[4:]
        y = attention(qkv, get(block, self.heads))  # (B, T, D)
        scale1, scale2 = (scale_table(block, path) for path in (self.scale1, self.scale2))
        x = linear(y, (out,), routing, residual=x, scale=scale1)
        act = activation_name(get(block, self.activation))
        # As one op, the two products keep less for backward, and on a CPU the rows between them near.
        if torch.is_grad_enabled() or x.device.type == "cpu":
            y = layer_norm(x, norm2, routing)
            return mlp(y, fc1, fc2, routing, activation=act, residual=x, scale=scale2)
        y = norm_linear(x, norm2, (fc1,), routing, activation=act)
        return linear(y, (fc2,), routing, residual=x, scale=scale2)


def attention(qkv: Tensor, heads: int) -> Tensor:
    """Full self-attention: (B, T, 3D) -> (B, T, D), one call for all experts; no copy is made of q, k or v.

    On a CPU that the reference serves it is tile by tile, as the reference is: the threads of one call for a batch
    round a tile's last bits by where in the batch it stands.
    """
    if len(qkv) > 1 and _reference_serves(qkv):
        return torch.cat([attention(tile.clone(), heads) for tile in qkv.split(1)])
    batch, tokens, width = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, heads, width // 3 // heads).permute(2, 0, 3, 1, 4).unbind()
    y = F.scaled_dot_product_attention(q, k, v)  # (B, H, T, D / H)
    return y.transpose(1, 2).reshape(batch, tokens, width // 3)


def _reference_serves(x: Tensor) -> bool:
    """Whether a CPU runs the reference; not asked under torch.compile, which cannot look a backend up."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    place = {"device": x.device, "dtype": x.dtype, "widths": (x.shape[2] // 3, x.shape[2])}
    chosen = [pick(op, "auto", **place) for op in ("norm_grouped_linear", "grouped_linear")]
    return any(".reference." in module.__name__ for module in chosen)


def scale_table(block: nn.Module, path: str | None) -> Tensor | None:
    """A LayerScale as (E, D), whether it is grouped or plain."""
    if path is None:
        return None
    owner_path, _, name = path.rpartition(".")
    owner = block.get_submodule(owner_path)
    if parametrize.is_parametrized(owner, name):
        return owner.parametrizations[name].original
    scale = getattr(owner, name)
    return scale if scale.ndim == 2 else scale.unsqueeze(0)


def _plan(
    attention: str,
    leaves: str,
    norms: str,
    *,
    heads: str = "num_attention_heads",
    act: str = "activation_fn",
    **more: str,
) -> PreNormPlan:
    roles = (f"{attention}.{leaf}" for leaf in leaves.split())
    norm1, norm2 = norms.split()
    query, key, value, out = roles
    owner = query.rpartition(".")[0]
    return PreNormPlan(
        norm1,
        query,
        key,
        value,
        out,
        norm2,
        "mlp.fc1",
        "mlp.fc2",
        f"mlp.{act}",
        f"{owner}.{heads}",
        **more,
    )


_CLIP = _plan(
    "self_attn", "q_proj k_proj v_proj out_proj", "layer_norm1 layer_norm2", heads="num_heads"
)
_SCALES = {"scale1": "layer_scale1.lambda1", "scale2": "layer_scale2.lambda1"}
_DINO = (
    _plan("attention", "q_proj k_proj v_proj o_proj", "norm1 norm2", **_SCALES),
    # transformers before 5.20
    _plan(
        "attention",
        "attention.query attention.key attention.value output.dense",
        "norm1 norm2",
        act="activation",
        **_SCALES,
    ),
)

# By class name of the block; the first row that fits serves. A class whose MLP or attention is another (SwiGLU, rotary
# embeddings, normalised queries) must not be here: leaf substitution serves it.
PLANS: dict[str, tuple[PreNormPlan, ...]] = {
    "SiglipEncoderLayer": (_CLIP,),
    "Siglip2EncoderLayer": (_CLIP,),
    "CLIPEncoderLayer": (_CLIP,),
    "Idefics3EncoderLayer": (_CLIP,),
    "SmolVLMEncoderLayer": (_CLIP,),
    "Dinov2Layer": _DINO,
    "Dinov2WithRegistersLayer": _DINO,
    "InternVLVisionLayer": (
        _plan(
            "attention",
            "q_proj k_proj v_proj projection_layer",
            "layernorm_before layernorm_after",
            heads="num_heads",
            scale1="lambda_1",
            scale2="lambda_2",
        ),
    ),
    "ViTLayer": (
        _plan("attention", "q_proj k_proj v_proj o_proj", "layernorm_before layernorm_after"),
    ),
}


def _drops(block: nn.Module) -> bool:
    """Whether any dropout or stochastic depth in the block has a probability above 0."""
    names = ("p", "drop_prob", "dropout", "attention_dropout", "dropout_prob")
    for module in block.modules():
        for name in names:
            rate = getattr(module, name, 0.0)
            if isinstance(rate, float | int) and rate > 0:
                return True
    return False
