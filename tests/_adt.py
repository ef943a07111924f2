"""AdaptiveDeformableTransform by other people's code: transformers' Deformable-DETR decoder layers, and PyTorch's own
nn.MultiheadAttention, image by image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeformableDetrConfig
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrDecoderLayer

from mixpert_kernels import Grids
from mixpert_kernels.modules import AdaptiveDeformableTransform
from mixpert_kernels.testing import randomize_

RENAMED = {"self_attn.out_proj": "self_attn.o_proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}


def transform(width: int = 16, **options: object) -> AdaptiveDeformableTransform:
    """A small one whose parameters are all random; its points lie in the image and beyond all four borders."""
    options = {"layers": 2, "heads": 2, "ffn": 10, "size": 4} | options
    made = AdaptiveDeformableTransform(width, **options)
    fresh = {n: p.detach().clone() for n, p in made.named_parameters()}
    randomize_(made)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name == "reference_points":
                parameter.mul_(0.2).add_(fresh[name])
            elif "sampling_offsets" in name:
                parameter.mul_(3).add_(fresh[name])
    return made.eval()


def features(grids: list[tuple[int, int]], width: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = sum(height * w for height, w in grids)
    return torch.randn(rows, width, generator=generator)


def by_transformers(adt: AdaptiveDeformableTransform, f: Tensor, grids: list) -> Tensor:
    """The same by transformers' layers with one level; differentiable by the parameters of ``adt``."""
    layers = [_decoder_layer(adt).train(adt.training).to(f.device) for _ in adt.layers]
    position, reference = adt.position_embeddings, adt.reference_points[:, :, None]  # one level
    outputs = []
    for image, (height, width) in _images(f, grids):
        h = _pooled(image, height, width, adt.size)
        shapes = torch.tensor([[height, width]])
        for layer, ours in zip(layers, adt.layers, strict=True):
            given = {
                "object_queries_position_embeddings": position,
                "reference_points": reference,
                "spatial_shapes": shapes,
                "spatial_shapes_list": [(height, width)],
                "level_start_index": torch.zeros(1, dtype=torch.long),
                "encoder_hidden_states": image[None],
            }
            h = torch.func.functional_call(layer, _renamed(ours), (h,), given)
        outputs.append(h)
    return torch.cat(outputs)


def by_multihead_attention(adt: AdaptiveDeformableTransform, f: Tensor, grids: list) -> Tensor:
    """The ablation with standard cross-attention, by nn.MultiheadAttention."""
    outputs = []
    for image, (height, width) in _images(f, grids):
        h = _pooled(image, height, width, adt.size)
        for layer in adt.layers:
            u = h + adt.position_embeddings
            y = _multihead(layer.self_attn, u, u, h)
            h = layer.self_attn_layer_norm(h + y)
            y = _multihead(
                layer.encoder_attn, h + adt.position_embeddings, image[None], image[None]
            )
            h = layer.encoder_attn_layer_norm(h + y)
            y = F.linear(h, layer.fc1.weight, layer.fc1.bias).relu()
            h = layer.final_layer_norm(h + F.linear(y, layer.fc2.weight, layer.fc2.bias))
        outputs.append(h)
    return torch.cat(outputs)


ORACLES = {"deformable": by_transformers, "standard": by_multihead_attention}


def results(compute, adt: AdaptiveDeformableTransform, f: Tensor, grids: list) -> dict[str, Tensor]:
    """The output and the gradients, by name, of ``compute(adt, f, grids)``."""
    f = f.detach().requires_grad_()
    adt.zero_grad()
    y = compute(adt, f, grids)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    (y * weights).sum().backward()
    found = {"y": y.detach(), "df": f.grad} | {n: p.grad for n, p in adt.named_parameters()}
    return without_key_biases(found)


def without_key_biases(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """A key's bias adds the same to all logits of a softmax: its gradient is rounding alone, and becomes one more
    column of its weight's."""
    for name in [n for n in found if n.endswith("k_proj.bias")]:
        weight = name.replace("bias", "weight")
        found[weight] = torch.cat([found[weight], found.pop(name)[:, None]], 1)
    return found


def ours(adt: AdaptiveDeformableTransform, f: Tensor, grids: list) -> Tensor:
    return adt(f, Grids.of(grids))


def assert_same(got: dict, plain: dict, truth: dict, bound: float | None) -> None:
    """Each relative error is below ``bound``, and all together are at most twice plain PyTorch's in the same dtype.

    All together, for how exact plain PyTorch is in one small gradient is luck.
    """
    assert got.keys() == truth.keys()
    errors = {n: _error(got[n], truth[n]) for n in truth}
    if bound is not None:
        assert max(errors.values()) <= bound, errors
    plain_errors = [_error(plain[n], truth[n]) for n in truth]
    assert math.hypot(*errors.values()) <= 2 * math.hypot(*plain_errors), (errors, plain_errors)


def _error(got: Tensor, truth: Tensor) -> float:
    assert got.shape == truth.shape
    return float((got.double() - truth.double()).norm() / truth.double().norm())


def _images(f: Tensor, grids: list):
    return zip(f.split([height * width for height, width in grids]), grids, strict=True)


def _pooled(image: Tensor, height: int, width: int, size: int) -> Tensor:  # (1, L, C)
    pooled = F.adaptive_avg_pool2d(image.T.reshape(1, -1, height, width), size)
    return pooled.flatten(2).transpose(1, 2)


def _decoder_layer(adt: AdaptiveDeformableTransform) -> nn.Module:
    config = DeformableDetrConfig(
        d_model=adt.width,
        decoder_attention_heads=adt.heads,
        decoder_n_points=adt.points,
        decoder_ffn_dim=adt.layers[0].fc1.out_features,
        num_feature_levels=1,
        attn_implementation="eager",
    )
    return DeformableDetrDecoderLayer(config)


def _renamed(layer: nn.Module) -> dict[str, nn.Parameter]:
    named = {}
    for name, parameter in layer.named_parameters():
        stem, _, kind = name.rpartition(".")
        named[f"{RENAMED.get(stem, stem)}.{kind}"] = parameter
    return named


def _multihead(attention: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    width, leaves = q.shape[-1], (attention.q_proj, attention.k_proj, attention.v_proj)
    module = nn.MultiheadAttention(width, attention.heads, batch_first=True, dtype=q.dtype)
    given = {
        "in_proj_weight": torch.cat([leaf.weight for leaf in leaves]),
        "in_proj_bias": torch.cat([leaf.bias for leaf in leaves]),
        "out_proj.weight": attention.out_proj.weight,
        "out_proj.bias": attention.out_proj.bias,
    }
    return torch.func.functional_call(module, given, (q, k, v), {"need_weights": False})[0]
