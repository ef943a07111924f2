"""A tower with untrained clones equals the transformers model and projector it was made from, on every route."""

from __future__ import annotations

import copy

import pytest
import torch
from _towers import (
    EXPERTS,
    KINDS,
    OUT,
    WIDTH,
    assert_close,
    make,
    pixels,
    plain,
    projector,
    randomise,
    run,
    substituted,
)
from torch import nn

from mixpert_kernels import FusedMixpertTower

every_kind = pytest.mark.parametrize("kind", KINDS)
both_ways = pytest.mark.parametrize("way", ["fused", "substituted"])


def clones(kind: str, way: str = "fused", **options: object) -> tuple[nn.Module, FusedMixpertTower]:
    """The plain model and the tower of its untrained clones."""
    model = KINDS[kind].build()
    options = {"num_experts": EXPERTS, **options}
    tower = FusedMixpertTower.from_vision_model(model, projector(), **options)
    return model, (substituted(tower) if way == "substituted" else tower)


@every_kind
def test_plan_is_where_it_is_meant_to_be(kind: str) -> None:
    _, tower = clones(kind)
    fused = [block.plan is not None for block in tower.experts]
    assert fused == [KINDS[kind].fused] * 2
    assert [plan is not None for plan in tower._trunk_plans] == fused
    assert tower.projector.plan is not None


@every_kind
@both_ways
@pytest.mark.parametrize("feature_layer", [-1, -2])
def test_every_route_equals_the_plain_model(kind: str, way: str, feature_layer: int) -> None:
    model, tower = clones(kind, way, feature_layer=feature_layer)
    for batch in (3, 1):
        images = pixels(batch, KINDS[kind].size)
        want = projector()(plain(kind, model, images, feature_layer=feature_layer))
        for expert in range(EXPERTS):
            assert_close(run(tower, images, expert), want)
        assert_close(run(tower, images), want)  # wherever the router sends them
    assert_close(run(tower, pixels(3, KINDS[kind].size), [2, 0, 1]), projector()(
        plain(kind, model, pixels(3, KINDS[kind].size), feature_layer=feature_layer)
    ))  # fmt: skip


@pytest.mark.parametrize("feature_layer", [3, 4])
def test_feature_layer_counts_from_the_front_too(feature_layer: int) -> None:
    model, tower = clones("clip", feature_layer=feature_layer)
    images = pixels(2, KINDS["clip"].size)
    want = projector()(plain("clip", model, images, feature_layer=feature_layer))
    assert_close(run(tower, images, 1), want)


@both_ways
@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.norm])
def test_final_norm_gives_the_last_hidden_state(kind: str, way: str) -> None:
    model, tower = clones(kind, way, final_norm=True)
    images = pixels(2, KINDS[kind].size)
    want = projector()(plain(kind, model, images, final_norm=True))
    assert_close(run(tower, images, [1, 0]), want)
    bare = projector()(plain(kind, model, images))
    assert (want - bare).abs().max() > 1e-2 * want.abs().max()


@both_ways
@pytest.mark.parametrize(
    ("kind", "size"), [(name, size) for name, kind in KINDS.items() for size in kind.odd]
)
def test_odd_sizes_are_interpolated(kind: str, way: str, size: tuple[int, int]) -> None:
    model, tower = clones(kind, way)
    images = pixels(2, size)
    want = projector()(plain(kind, model, images))
    assert_close(run(tower, images, [2, 1], interpolate_pos_encoding=True), want)


@every_kind
def test_one_expert_is_the_plain_model(kind: str) -> None:
    model, tower = clones(kind, num_experts=1)
    images = pixels(2, KINDS[kind].size)
    with torch.no_grad():
        output = tower(images)
    assert output.expert.tolist() == [0, 0]
    assert output.router_scores.tolist() == [[1.0], [1.0]]
    assert_close(output.last_hidden_state, projector()(plain(kind, model, images)))


@every_kind
@both_ways
def test_save_and_load_change_nothing(kind: str, way: str, tmp_path) -> None:
    model, tower = clones(kind)
    tower.save_pretrained(tmp_path / "tower")
    loaded = FusedMixpertTower.from_pretrained(tmp_path / "tower").eval()
    if way == "substituted":
        substituted(loaded)
    images = pixels(2, KINDS[kind].size)
    want = projector()(plain(kind, model, images))
    for expert in range(EXPERTS):
        assert_close(run(loaded, images, expert), want)


@every_kind
def test_cls_token_is_kept_and_projected(kind: str) -> None:
    _, tower = clones(kind)
    size = KINDS[kind].size
    patch = tower.config.vision_config.patch_size
    patch = patch if isinstance(patch, int) else patch[0]
    tokens = KINDS[kind].cls + (size[0] // patch) * (size[1] // patch)
    assert run(tower, pixels(2, size)).shape == (2, tokens, OUT)


@every_kind
@both_ways
def test_with_gradients_it_is_the_same(kind: str, way: str) -> None:
    tower = make(kind)
    images = pixels(3, KINDS[kind].size)
    want = run(tower, images, [2, 0, 2])
    if way == "substituted":
        substituted(tower)
    got = tower(images, expert=torch.tensor([2, 0, 2])).last_hidden_state
    assert got.requires_grad
    assert_close(got.detach(), want)


@every_kind
def test_export_is_the_plain_class_and_gives_the_forced_result(kind: str) -> None:
    tower = make(kind)
    images = pixels(2, KINDS[kind].size)
    for expert in range(EXPERTS):
        vision, head = tower.export_expert(expert)
        assert type(vision) is type(KINDS[kind].build())
        assert type(head) is nn.Sequential
        assert not vision.training
        with torch.no_grad():
            assert_close(head(plain(kind, vision, images)), run(tower, images, expert))


@every_kind
def test_export_survives_transformers_own_save(kind: str, tmp_path) -> None:
    tower = make(kind, feature_layer=-2, expert_layers=1)
    vision, head = tower.export_expert(1)
    vision.save_pretrained(tmp_path)
    again = type(vision).from_pretrained(tmp_path).eval()
    images = pixels(2, KINDS[kind].size)
    with torch.no_grad():
        assert_close(head(plain(kind, again, images)), run(tower, images, 1))


def test_export_keeps_dtype_mode_and_independence() -> None:
    tower = make("siglip").double().train()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.div_(3)  # what float32 cannot hold
    vision, head = tower.export_expert(0)
    assert vision.training
    assert {p.dtype for p in (*vision.parameters(), *head.parameters())} == {torch.float64}
    state = tower.trunk.state_dict()
    for name, value in vision.state_dict().items():
        if name in state:
            assert torch.equal(value, state[name]), name  # float64 never went through float32
    before = run(tower.eval(), pixels(2, (30, 30)).double(), 0)
    randomise(vision, 9), randomise(head, 9)
    assert torch.equal(run(tower, pixels(2, (30, 30)).double(), 0), before)


PROJECTORS = {
    "none": lambda: None,
    "linear": lambda: nn.Linear(WIDTH, OUT),
    "no_bias": lambda: nn.Linear(WIDTH, OUT, bias=False),
    "quick_gelu": lambda: nn.Sequential(
        nn.Linear(WIDTH, 9), torch.nn.GELU(approximate="tanh"), nn.Linear(9, OUT, bias=False)
    ),
    "relu": lambda: nn.Sequential(nn.Linear(WIDTH, 9), nn.ReLU(), nn.Linear(9, OUT)),
    "silu": lambda: nn.Sequential(nn.Linear(WIDTH, 9), nn.SiLU(), nn.Linear(9, OUT)),
    "long": lambda: nn.Sequential(
        nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 9), nn.GELU(), nn.Linear(9, 9), nn.Linear(9, OUT)
    ),
}


def llava(name: str) -> nn.Module:
    """The projector of one of LLaVA's families, from transformers' own code."""
    module = __import__(f"transformers.models.{name}.modeling_{name}", fromlist=["*"])
    names = {"llava": "Llava", "llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision"}
    from transformers import SiglipVisionConfig

    config = getattr(__import__("transformers"), f"{names[name]}Config")(
        vision_config=SiglipVisionConfig(hidden_size=WIDTH, num_attention_heads=4),
        text_config={"model_type": "qwen2", "hidden_size": OUT, "num_attention_heads": 4},
    )
    return getattr(module, f"{names[name]}MultiModalProjector")(config)


PROJECTORS |= {n: lambda n=n: llava(n) for n in ("llava", "llava_next", "llava_onevision")}


@pytest.mark.parametrize("name", PROJECTORS)
@both_ways
def test_projectors(name: str, way: str, tmp_path) -> None:
    model, head = KINDS["siglip"].build(), PROJECTORS[name]()
    if head is not None:
        randomise(head, 5)
    tower = FusedMixpertTower.from_vision_model(model, copy.deepcopy(head), num_experts=2)
    tower.save_pretrained(tmp_path)
    images = pixels(2, (30, 30))
    want = plain("siglip", model, images)
    want = want if head is None else head(want).detach()
    for each in (tower, FusedMixpertTower.from_pretrained(tmp_path).eval()):
        if way == "substituted":
            substituted(each)
        assert_close(run(each, images, [1, 0]), want)
        exported = each.export_expert(1)[1]
        if head is None:
            assert exported is None
        else:
            assert_close(exported(plain("siglip", model, images)).detach(), want)
    assert tower.config.hidden_size == want.shape[-1]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["siglip", "dinov2", "internvl"])
@both_ways
def test_attention_implementations(kind: str, attention: str, way: str, tmp_path) -> None:
    model, tower = clones(kind)
    tower.save_pretrained(tmp_path)
    images = pixels(2, KINDS[kind].size)
    want = projector()(plain(kind, model, images))
    loaded = FusedMixpertTower.from_pretrained(tmp_path, attn_implementation=attention).eval()
    if way == "substituted":
        substituted(loaded)
    used = {
        m.config._attn_implementation
        for part in (loaded.trunk, loaded.experts)
        for m in part.modules()
        if "Attention" in type(m).__name__ and hasattr(m, "config")
    }
    assert used == {attention}
    assert_close(run(loaded, images, [1, 2]), want)
    loaded.set_attn_implementation("eager" if attention == "sdpa" else "sdpa")
    assert_close(run(loaded, images, [1, 2]), want)


@pytest.mark.parametrize("kind", ["siglip", "clip", "dinov2", "vit", "dinov3", "internvl"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(kind: str, dtype: torch.dtype) -> None:
    tower = make(kind)
    images = pixels(3, KINDS[kind].size)
    want = run(tower, images, [2, 0, 1])
    limit = {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float64: 1e-5}[dtype]
    tower.to(dtype)
    got = tower(images.to(dtype), expert=torch.tensor([2, 0, 1]))
    assert got.last_hidden_state.dtype == dtype
    assert got.router_scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(got.last_hidden_state.detach().float(), want, limit)
    assert_close(run(tower, images.to(dtype), [2, 0, 1]).float(), want, limit)
