"""AdaptiveDeformableTransform written in other ways, on the same parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mixpert_kernels.modules import AdaptiveDeformableTransform

Sizes = list[tuple[int, int]]
# A kernel is launched by none of these, nor by what returns a view.
_FREE = ("empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "_reshape_alias")


def image_loop(adt: AdaptiveDeformableTransform, f: Tensor, sizes: Sizes) -> Tensor:
    """Everything for the whole batch at once, but what sees a grid: pooling and sampling, image by image."""
    counts = [height * width for height, width in sizes]
    h = torch.cat([_pooled(*pair, adt.size) for pair in zip(f.split(counts), sizes, strict=True)])
    reference = adt.reference_points[0]
    for layer in adt.layers:
        attention, u = layer.self_attn, h + adt.position_embeddings
        q, k, v = (_heads(leaf(x), adt.heads) for leaf, x in _inputs(attention, u, h))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = layer.self_attn_layer_norm(h + attention.out_proj(y))
        attention, u = layer.encoder_attn, h + adt.position_embeddings
        offsets = attention.sampling_offsets(u).unflatten(-1, (adt.heads, adt.points, 2))
        weights = attention.attention_weights(u).unflatten(-1, (adt.heads, adt.points)).softmax(-1)
        values = attention.value_proj(f).split(counts)
        y = torch.stack(
            [
                _sampled(*image, reference)
                for image in zip(values, offsets, weights, sizes, strict=True)
            ]
        )
        h = layer.encoder_attn_layer_norm(h + attention.output_proj(y))
        h = layer.final_layer_norm(h + layer.fc2(layer.fc1(h).relu()))
    return h


def naive_loop(adt: AdaptiveDeformableTransform, f: Tensor, sizes: Sizes) -> Tensor:
    """All of it image by image."""
    images = f.split([height * width for height, width in sizes])
    pairs = zip(images, sizes, strict=True)
    return torch.cat([image_loop(adt, image, [size]) for image, size in pairs])


def transformers_layers(adt: AdaptiveDeformableTransform) -> Callable[[Tensor, Sizes], Tensor]:
    """transformers' Deformable-DETR decoder layers, on images of one size; on the parameters of ``adt`` themselves."""
    from transformers import DeformableDetrConfig
    from transformers.models.deformable_detr.modeling_deformable_detr import (
        DeformableDetrDecoderLayer,
    )

    config = DeformableDetrConfig(
        d_model=adt.width,
        decoder_attention_heads=adt.heads,
        decoder_n_points=adt.points,
        decoder_ffn_dim=adt.layers[0].fc1.out_features,
        num_feature_levels=1,
        attn_implementation="sdpa",
    )
    renamed = {"self_attn.out_proj": "self_attn.o_proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    layers = []
    for ours in adt.layers:
        layer = DeformableDetrDecoderLayer(config).eval()
        for name, leaf in ours.named_modules():
            if isinstance(leaf, nn.Linear | nn.LayerNorm):
                layer.set_submodule(renamed.get(name, name), leaf)
        layers.append(layer)

    def forward(f: Tensor, sizes: Sizes) -> Tensor:
        (height, width), batch = sizes[0], len(sizes)
        f = f.view(batch, height * width, -1)
        grid = f.transpose(1, 2).unflatten(2, (height, width))
        h = F.adaptive_avg_pool2d(grid, adt.size).flatten(2).transpose(1, 2)
        for layer in layers:
            h = layer(
                h,
                adt.position_embeddings,
                adt.reference_points[:, :, None].expand(batch, -1, -1, -1),
                torch.tensor([[height, width]], device=f.device),
                [(height, width)],
                torch.zeros(1, dtype=torch.long, device=f.device),
                encoder_hidden_states=f,
            )
        return h

    return forward


class Launches(TorchDispatchMode):
    """Counts the calls of ops that compute something: launches, on a GPU, where an op is one."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        views = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not views and func._schema.name.split("::")[1] not in _FREE:
            self.count += 1
        return func(*args, **kwargs or {})


def _inputs(attention: nn.Module, u: Tensor, h: Tensor):
    leaves = (attention.q_proj, attention.k_proj, attention.v_proj)
    return zip(leaves, (u, u, h), strict=True)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _pooled(image: Tensor, size: tuple[int, int], side: int) -> Tensor:  # (1, L, C)
    grid = image.T.unflatten(1, size)[None]
    return F.adaptive_avg_pool2d(grid, side).flatten(2).transpose(1, 2)


def _sampled(
    value: Tensor,  # (H W, C)
    offsets: Tensor,  # (L, heads, points, 2)
    weights: Tensor,  # (L, heads, points)
    size: tuple[int, int],
    reference: Tensor,  # (L, 2)
) -> Tensor:  # (L, C)
    height, width = size
    extent = offsets.new_tensor([width, height])
    place = 2 * (reference[:, None, None] + offsets / extent) - 1
    heads = weights.shape[1]
    grid = value.T.reshape(heads, -1, height, width)
    place = place.transpose(0, 1)  # (heads, L, points, 2)
    samples = F.grid_sample(grid, place.to(grid.dtype), align_corners=False)
    return (samples * weights.transpose(0, 1)[:, None]).sum(-1).flatten(0, 1).T
