"""Bad input: one line that names the argument, the condition and the value, before any work."""

from __future__ import annotations

import pytest
import torch
from _towers import KINDS, WIDTH, make, pixels, projector, refused, run
from torch import nn
from transformers import ConvNextConfig, ConvNextModel, SwinConfig, SwinModel

from mixpert_kernels import FusedMixpertTower, MixpertVisionConfig

GOOD = pixels(4, (30, 30))
LIST = (0, 0, 1, 2)


def ids(*values: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


@pytest.fixture(scope="module")
def tower() -> FusedMixpertTower:
    return make("siglip")


@pytest.fixture
def idle(tower: FusedMixpertTower):
    """The tower, which must not begin to work."""

    def begun(*_: object) -> None:
        raise AssertionError("work was begun before the arguments were checked")

    hook = tower.trunk.embeddings.register_forward_pre_hook(begun)
    yield tower
    hook.remove()


PIXELS = {
    "rank 3": (GOOD[0], ("(B, C, H, W)", "(3, 30, 30)")),
    "rank 5": (GOOD[None], ("(B, C, H, W)", "(1, 4, 3, 30, 30)")),
    "empty batch": (GOOD[:0], ("(B, C, H, W)", "(0, 3, 30, 30)")),
    "one channel": (GOOD[:, :1], ("3 channels", "got 1")),
    "channels last": (GOOD.permute(0, 2, 3, 1), ("3 channels", "got 30")),
    "height": (GOOD[:, :, :29], ("(30, 30)", "(29, 30)", "interpolate_pos_encoding")),
    "below a patch": (GOOD[..., :7], ("patch", "(8, 8)", "(30, 7)")),
    "uint8": (GOOD.byte(), ("floating", "torch.uint8")),
    "int64": (GOOD.long(), ("floating", "torch.int64")),
    "a list": (GOOD.tolist(), ("floating", "list")),
    "numpy": (GOOD.numpy(), ("floating", "ndarray")),
    "device": (GOOD.to("meta"), ("device", "cpu", "meta")),
}


@pytest.mark.parametrize("case", PIXELS)
def test_pixels(case: str, idle: FusedMixpertTower) -> None:
    images, words = PIXELS[case]
    for call in (idle, idle.trunk_features, idle.router_features):
        refused(lambda call=call: call(images), "FusedMixpertTower", "pixel_values must", *words)


ARGUMENTS = {
    "expert too large": ({"expert": ids(0, 3, 1, 0)}, ("expert must", "0..2", "got 3")),
    "expert negative": ({"expert": ids(0, -1, 1, 0)}, ("expert must", "0..2", "got -1")),
    "expert too few": ({"expert": ids(0, 1, 2)}, ("expert must", "4", "got 3")),
    "expert too many": ({"expert": ids(0, 1, 2, 0, 1)}, ("expert must", "4", "got 5")),
    "expert float": ({"expert": torch.zeros(4)}, ("expert must", "int", "torch.float32")),
    "expert bool": ({"expert": torch.zeros(4).bool()}, ("expert must", "int", "torch.bool")),
    "expert matrix": ({"expert": torch.zeros(4, 1).long()}, ("expert must", "(4, 1)")),
    "expert scalar": ({"expert": torch.tensor(1)}, ("expert must", "1 dimension", "()")),
    "expert int": ({"expert": 1}, ("expert must", "int")),
    "expert list": ({"expert": [0, 1, 2, 0]}, ("expert must", "tensor", "list")),
    "expert a tile": (
        {"expert": ids(0, 1, 2, 0), "image_of_tile": ids(*LIST)},
        ("expert must", "3", "got 4"),
    ),
    "tiles unsorted": ({"image_of_tile": ids(0, 1, 0, 1)}, ("image_of_tile must", "[0, 1, 0, 1]")),
    "tiles with a gap": (
        {"image_of_tile": ids(0, 0, 2, 3)},
        ("image_of_tile must", "gap", "[0, 0"),
    ),
    "tiles not from 0": ({"image_of_tile": ids(1, 1, 2, 3)}, ("image_of_tile must", "0", "[1, 1")),
    "tiles negative": ({"image_of_tile": ids(-1, 0, 1, 2)}, ("image_of_tile must", "0", "[-1, 0")),
    "tiles too few": ({"image_of_tile": ids(0, 1, 2)}, ("image_of_tile must", "4", "got 3")),
    "tiles too many": ({"image_of_tile": ids(0, 1, 2, 3, 4)}, ("image_of_tile must", "4", "got 5")),
    "tiles float": ({"image_of_tile": torch.zeros(4)}, ("image_of_tile must", "torch.float32")),
    "tiles matrix": ({"image_of_tile": ids(*LIST)[None]}, ("image_of_tile must", "(1, 4)")),
    "tiles list": ({"image_of_tile": list(LIST)}, ("image_of_tile must", "list")),
    "tiles none": ({"image_of_tile": ids()}, ("image_of_tile must", "4, got 0")),
    "base alone": ({"base_tile": ids(0, 1)}, ("base_tile must", "image_of_tile")),
    "base too few": ({"base_tile": ids(0, 2)}, ("base_tile must", "3", "got 2")),
    "base too many": ({"base_tile": ids(0, 2, 3, 3)}, ("base_tile must", "3", "got 4")),
    "base out of range": ({"base_tile": ids(0, 2, 4)}, ("base_tile must", "[0, 2, 4]")),
    "base negative": ({"base_tile": ids(0, 2, -1)}, ("base_tile must", "[0, 2, -1]")),
    "base of another": ({"base_tile": ids(2, 0, 3)}, ("base_tile must", "[2, 0, 3]")),
    "base float": ({"base_tile": torch.zeros(3)}, ("base_tile must", "torch.float32")),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_routes_and_tiles(case: str, idle: FusedMixpertTower) -> None:
    options, words = ARGUMENTS[case]
    if "base" in case and case != "base alone":
        options = {"image_of_tile": ids(*LIST), **options}
    refused(lambda: idle(GOOD, **options), "FusedMixpertTower", *words)


@pytest.mark.parametrize("case", [c for c in ARGUMENTS if "expert" not in c])
def test_router_features_check_tiles_before_any_work(case: str, idle: FusedMixpertTower) -> None:
    options, words = ARGUMENTS[case]
    if "base" in case and case != "base alone":
        options = {"image_of_tile": ids(*LIST), **options}
    refused(lambda: idle.router_features(GOOD, **options), "FusedMixpertTower", *words)


CONSTRUCTION = {
    "no experts": ({"num_experts": 0}, ("num_experts must", "1", "got 0")),
    "negative experts": ({"num_experts": -2}, ("num_experts must", "got -2")),
    "experts not whole": ({"num_experts": 2.5}, ("num_experts must", "2.5")),
    "all layers": ({"expert_layers": 4}, ("expert_layers must", "got 4")),
    "more layers": ({"expert_layers": 9}, ("expert_layers must", "got 9")),
    "all layers that feed": (
        {"expert_layers": 3, "feature_layer": -2},
        ("expert_layers must", "3 layers", "got 3"),
    ),
    "negative layers": ({"expert_layers": -1}, ("expert_layers must", "got -1")),
    "layers not whole": ({"expert_layers": 1.5}, ("expert_layers must", "1.5")),
    "feature layer 0": ({"feature_layer": 0}, ("feature_layer must", "got 0")),
    "feature layer -5": ({"feature_layer": -5}, ("feature_layer must", "got -5")),
    "feature layer 5": ({"feature_layer": 5}, ("feature_layer must", "got 5")),
    "feature layers": ({"feature_layer": [-2, -1]}, ("feature_layer must", "[-2, -1]")),
    "strategy": ({"routing": "best"}, ("routing must", "score_difference", "best")),
    "tau low": ({"tau": -0.1}, ("tau must", "[0, 1]", "-0.1")),
    "tau high": ({"tau": 1.5}, ("tau must", "[0, 1]", "1.5")),
    "tau nan": ({"tau": float("nan")}, ("tau must", "[0, 1]", "nan")),
    "delta low": ({"delta": -0.1}, ("delta must", "[0, 1]", "-0.1")),
    "delta high": ({"delta": 1.01}, ("delta must", "[0, 1]", "1.01")),
    "against": ({"against": "nobody"}, ("against must", "runner_up", "nobody")),
    "router width": ({"router_hidden": 0}, ("router_hidden must", "got 0")),
    "too few names": ({"expert_names": ["a"]}, ("expert_names must", "4", "['a']")),
    "equal names": ({"expert_names": list("aabc")}, ("expert_names must", "different", "'a', 'a'")),
    "norm of a middle layer": (
        {"final_norm": True, "feature_layer": -2},
        ("final_norm must", "feature_layer -2"),
    ),
}


@pytest.mark.parametrize("case", CONSTRUCTION)
def test_construction(case: str) -> None:
    options, words = CONSTRUCTION[case]
    model = KINDS["siglip"].build()
    refused(
        lambda: FusedMixpertTower.from_vision_model(model, projector(), **options),
        "FusedMixpertTower" if "must" in words[0] and "tau" not in case else "",
        *words,
    )


@pytest.mark.parametrize("case", [c for c in CONSTRUCTION if "norm" not in c])
def test_configuration_checks_the_same(case: str) -> None:
    options, words = CONSTRUCTION[case]
    vision = KINDS["siglip"].build().config
    refused(
        lambda: MixpertVisionConfig(
            vision_config=vision, projector={"kind": "custom", "out_features": 3}, **options
        ),
        *words,
    )


def test_no_layers_and_no_projector_leave_no_expert() -> None:
    model = KINDS["siglip"].build()
    refused(
        lambda: FusedMixpertTower.from_vision_model(model, expert_layers=0),
        "expert_layers must",
        "1..3",
        "got 0",
    )
    tower = FusedMixpertTower.from_vision_model(model, projector(), expert_layers=0)
    assert len(tower.experts) == 0
    assert run(tower, GOOD, [0, 1, 2, 3]).shape[0] == 4


def test_unsupported_model_types_list_the_supported() -> None:
    convnext = ConvNextModel(ConvNextConfig(num_stages=2, hidden_sizes=[8, 8], depths=[1, 1]))
    swin = SwinModel(SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[2, 2], image_size=32))
    for model, name in ((convnext, "convnext"), (swin, "swin")):
        refused(
            lambda model=model: FusedMixpertTower.from_vision_model(model),
            "vision_model must",
            name,
            *("siglip_vision_model", "siglip2_vision_model", "clip_vision_model", "dinov2"),
            *("dinov2_with_registers", "vit", "dinov3_vit", "internvl_vision"),
        )


def test_what_is_no_transformers_model_is_refused() -> None:
    for model in (nn.Linear(2, 2), nn.Sequential(), "google/siglip", None):
        refused(lambda model=model: FusedMixpertTower.from_vision_model(model), "vision_model must")


def test_a_dual_encoder_is_refused() -> None:
    from transformers import CLIPConfig, CLIPModel

    model = CLIPModel(CLIPConfig(text_config={"num_hidden_layers": 1, "vocab_size": 9}))
    refused(lambda: FusedMixpertTower.from_vision_model(model), "vision_model must", "clip")


def test_a_projector_that_cannot_be_cloned_names_the_leaf() -> None:
    model = KINDS["siglip"].build()
    head = nn.Sequential(nn.Linear(WIDTH, 8), nn.Conv1d(9, 9, 1))
    refused(
        lambda: FusedMixpertTower.from_vision_model(model, head), "cannot clone", "Conv1d", "at 1"
    )


def test_a_block_that_cannot_be_cloned_names_the_leaf() -> None:
    model = KINDS["siglip"].build()
    model.encoder.layers[3].mlp.extra = nn.Bilinear(2, 2, 2)
    refused(
        lambda: FusedMixpertTower.from_vision_model(model), "cannot clone", "Bilinear", "mlp.extra"
    )


@pytest.mark.parametrize("kind", ["internvl", "aimv2", "beit", "dinov3"])
def test_final_norm_is_refused_where_it_is_not_known(kind: str) -> None:
    if KINDS[kind].norm:
        return
    model = KINDS[kind].build()
    if kind != "internvl":
        refused(
            lambda: FusedMixpertTower.from_vision_model(model, final_norm=True), "final_norm must"
        )


@pytest.mark.parametrize("expert", [-1, 3])
def test_export_of_an_expert_there_is_not(expert: int, tower: FusedMixpertTower) -> None:
    refused(lambda: tower.export_expert(expert), "export_expert", "0..2", f"got {expert}")


def test_errors_of_other_kinds_check_sizes_too() -> None:
    clip, dinov2, siglip2 = make("clip"), make("dinov2"), make("siglip2")
    refused(lambda: clip(pixels(1, (32, 32))), "pixel_values", "(30, 30)", "(32, 32)")
    refused(lambda: dinov2(pixels(1, (13, 28))), "pixel_values", "patch", "(13, 28)")
    refused(lambda: siglip2(pixels(1, (7, 28))), "pixel_values", "patch", "(7, 28)")


def test_after_an_error_the_tower_works_on(tower: FusedMixpertTower) -> None:
    want = run(tower, GOOD, [0, 1, 2, 1])
    refused(lambda: run(tower, GOOD, [0, 1, 2, 7]), "expert")
    assert torch.equal(run(tower, GOOD, [0, 1, 2, 1]), want)
