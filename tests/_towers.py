"""Tiny vision models of every type a tower is tested on, and the plain model it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import transformers
from torch import Tensor, nn

from mixpert_kernels import FusedMixpertTower, Routing

WIDTH, LAYERS, OUT, EXPERTS = 32, 4, 12, 3
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
WIDE = {**SIZES, "intermediate_size": 48}
DINO = {**SIZES, "mlp_ratio": 2, "image_size": 28, "patch_size": 14}


@dataclass(frozen=True)
class Kind:
    """One vision model: how to make it, and what it is known to do.

    Attributes:
        model: name of its class in transformers.
        config: name of its configuration's class.
        fields: of the configuration.
        size: (H, W) of the pixels it takes.
        odd: other sizes it takes, interpolating.
        fused: whether its blocks have a fused plan.
        cls: how many tokens stand before the patches.
        norm: path of the final norm; None where final_norm is refused.
    """

    model: str
    config: str
    fields: dict
    size: tuple[int, int]
    odd: tuple[tuple[int, int], ...] = ()
    fused: bool = True
    cls: int = 0
    norm: str | None = None

    def build(self, seed: int = 0, **overrides: object) -> nn.Module:
        """The model in eval mode, every parameter random: weights, biases, gains and LayerScales alike."""
        fields = {**self.fields, **overrides}
        model = getattr(transformers, self.model)(getattr(transformers, self.config)(**fields))
        return randomise(model.eval(), seed)


def _kind(name: str, fields: dict, *rest: object, suffix: str = "Model", **more: object) -> Kind:
    return Kind(
        f"{name}{suffix}", f"{name}{suffix.removesuffix('Model')}Config", fields, *rest, **more
    )


_SQUARE = {**WIDE, "image_size": 30, "patch_size": 8}  # no multiple of the patch: 3 x 3 patches
_PAIR = {**WIDE, "image_size": [32, 32], "patch_size": [8, 8]}
KINDS: dict[str, Kind] = {
    "siglip": _kind("Siglip", _SQUARE, (30, 30), ((37, 46),), suffix="VisionModel", norm="post_layernorm"),
    "siglip2": _kind(
        "Siglip2", {**WIDE, "patch_size": 8, "num_patches": 16}, (32, 32), ((24, 40),),
        suffix="VisionModel", norm="post_layernorm",
    ),
    "clip": _kind("CLIP", _SQUARE, (30, 30), ((37, 46),), suffix="VisionModel", cls=1),
    "dinov2": _kind("Dinov2", DINO, (28, 28), ((42, 28), (45, 58)), cls=1, norm="layernorm"),
    "dinov2_registers": _kind(
        "Dinov2WithRegisters", DINO, (28, 28), ((42, 56),), cls=5, norm="layernorm"
    ),
    "dinov2_swiglu": _kind(
        "Dinov2", {**DINO, "use_swiglu_ffn": True}, (28, 28), ((42, 28),), False, 1, "layernorm"
    ),
    "vit": _kind("ViT", _SQUARE, (30, 30), ((40, 48),), cls=1, norm="layernorm"),
    "dinov3": _kind(
        "DINOv3ViT", {**WIDE, "image_size": 32, "patch_size": 8, "num_register_tokens": 4},
        (32, 32), ((24, 43),), False, 5, "norm",
    ),
    "internvl": _kind("InternVL", _PAIR, (32, 32), ((24, 40),), cls=1, suffix="VisionModel"),
    "internvl_rms": _kind(
        "InternVL", {**_PAIR, "norm_type": "rms_norm", "use_qk_norm": True}, (32, 32), ((24, 40),), False, 1,
        suffix="VisionModel",
    ),
    # Types that no table of the package lists.
    "aimv2": _kind(
        "Aimv2", {**WIDE, "image_size": 32, "patch_size": 8}, (32, 32), (), False, suffix="VisionModel"
    ),
    "beit": _kind("Beit", {**WIDE, "image_size": 32, "patch_size": 8, "drop_path_rate": 0.0}, (32, 32), (), False, 1),
}  # fmt: skip


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter anew, at scales that keep activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            parameter.copy_(noise * (parameter.numel() / len(parameter)) ** -0.5)
        else:
            parameter.copy_(noise * 0.3 + (0.0 if "bias" in name else 0.8))
    return module


def projector() -> nn.Module:
    return randomise(nn.Sequential(nn.Linear(WIDTH, 20), nn.GELU(), nn.Linear(20, OUT)), 7)


def pixels(batch: int, size: tuple[int, int], seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *size, generator=generator)


def make(kind: str = "siglip", seed: int = 0, **options: object) -> FusedMixpertTower:
    """A tower of ``kind`` in eval mode with different experts, all its parameters random."""
    options = {"num_experts": EXPERTS, "routing": "direct", **options}
    model = KINDS[kind].build(seed, num_hidden_layers=options.pop("layers", LAYERS))
    made = FusedMixpertTower.from_vision_model(model, projector(), **options)
    return centre(tell_apart(made, seed), KINDS[kind].size)


@torch.no_grad()
def tell_apart(tower: FusedMixpertTower, seed: int = 0) -> FusedMixpertTower:
    """Randomise router and experts, so that no two experts and no two images' scores are alike."""
    randomise(tower.experts, seed + 1)
    if tower.projector is not None:
        randomise(tower.projector, seed + 2)
    randomise(tower.router, seed + 3)
    tower.router.out.weight.mul_(20)
    return tower


@torch.no_grad()
def centre(tower: FusedMixpertTower, size: tuple[int, int]) -> FusedMixpertTower:
    """Set the router's bias so that random images spread over the experts."""
    logits = tower.router(tower.router_features(pixels(12, size, seed=30)))
    tower.router.out.bias -= logits.mean(0)
    return tower


def substituted(tower: FusedMixpertTower) -> FusedMixpertTower:
    """Let the blocks' own forwards run everywhere: no fused plan, only substituted leaves."""
    tower.config.fuse_trunk = False
    for block in (*tower.experts, tower.projector):
        if block is not None:
            block.plan = None
    return tower


@torch.no_grad()
def plain(
    kind: str,
    model: nn.Module,
    images: Tensor,
    *,
    feature_layer: int = -1,
    final_norm: bool = False,
) -> Tensor:
    """What transformers gives: ``hidden_states[feature_layer]``, or its last hidden state after the norm."""
    if kind == "siglip2":
        call = _patches(images, model.config.patch_size)
    else:
        call = {"pixel_values": images}
        if kind in ("siglip", "clip", "vit") and images.shape[2:] != KINDS[kind].size:
            call["interpolate_pos_encoding"] = True
    outputs = model(**call, output_hidden_states=True)
    return outputs.last_hidden_state if final_norm else outputs.hidden_states[feature_layer]


def _patches(images: Tensor, size: int) -> dict[str, Tensor]:
    """SigLIP2's input, patch by patch."""
    rows, columns = images.shape[2] // size, images.shape[3] // size
    patches = [
        image[:, r * size : (r + 1) * size, c * size : (c + 1) * size].permute(1, 2, 0).flatten()
        for image in images
        for r in range(rows)
        for c in range(columns)
    ]
    return {
        "pixel_values": torch.stack(patches).view(len(images), rows * columns, -1),
        "pixel_attention_mask": torch.ones(len(images), rows * columns, dtype=torch.long),
        "spatial_shapes": torch.tensor([[rows, columns]] * len(images)),
    }


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference relative to the largest value; infinite where the shapes or NaNs differ."""
    if got.shape != want.shape or not bool(got.isfinite().all()):
        return float("inf")
    return float((got - want).abs().max().detach() / want.abs().max().detach())


def assert_close(got: Tensor, want: Tensor, limit: float = 1e-5) -> None:
    off = error(got, want)
    assert off <= limit, f"relative error {off:.2e} > {limit:.0e}"


@torch.no_grad()
def run(
    tower: FusedMixpertTower, images: Tensor, expert: object = None, **options: object
) -> Tensor:
    """The tower's features; ``expert`` forces the routes of all images (an int) or of each (a list)."""
    if isinstance(expert, int):
        expert = [expert] * len(images)
    forced = None if expert is None else torch.tensor(expert)
    return tower(images, expert=forced, **options).last_hidden_state


def tile_by_tile(tower: FusedMixpertTower, images: Tensor, routes: list[int]) -> Tensor:
    """The same features, image by image, each through the plain modules of its expert."""
    return torch.cat([run(tower, images[b : b + 1], e) for b, e in enumerate(routes)])


def refused(call: Callable[[], object], *words: str) -> str:
    """Assert that a call raises a one-line ValueError that holds every word; return its message."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message, message
    assert all(word in message for word in words), (words, message)
    return message


def reference_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every op on the reference backend, whose results do not depend on a tile's neighbours by a bit."""
    monkeypatch.setattr("mixpert_kernels.backends.BACKENDS", ("reference",))


def routing(*expert: int) -> Routing:
    return Routing.forced(torch.tensor(expert), EXPERTS)


def tower_of(kind: str, way: str = "fused", **options: object) -> FusedMixpertTower:
    tower = make(kind, **options)
    return substituted(tower) if way == "substituted" else tower


def grouped(tower: FusedMixpertTower) -> dict[str, nn.Parameter]:
    """Every parameter that has E copies."""
    return {
        name: parameter
        for name, parameter in tower.named_parameters()
        if name.startswith(("experts.", "projector."))
    }
