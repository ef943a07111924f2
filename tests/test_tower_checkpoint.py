"""Checkpoints: whole or not at all, complete or an error that names what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from _towers import (
    EXPERTS,
    KINDS,
    WIDTH,
    assert_close,
    make,
    pixels,
    plain,
    refused,
    run,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel

from mixpert_kernels import FusedMixpertTower, MixpertVisionConfig

ROUTES = [2, 0, 1]
WEIGHTS = "model.safetensors"


def features(tower: FusedMixpertTower, kind: str = "siglip") -> torch.Tensor:
    return run(tower.eval(), pixels(3, KINDS[kind].size), ROUTES)


def load(path: Path, **options: object) -> FusedMixpertTower:
    return FusedMixpertTower.from_pretrained(path, **options)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, FusedMixpertTower]:
    tower = make("siglip")
    tower.save_pretrained(tmp_path / "tower")
    return tmp_path / "tower", tower


def edit(path: Path, change) -> None:
    """Rewrite the weight file after ``change`` has edited its tensors in place."""
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})


def edit_config(path: Path, **fields: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **fields}))


# Round trips


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [None, "20KB"])
def test_round_trip_keeps_every_bit(kind: str, size: str | None, tmp_path: Path) -> None:
    tower = make(kind)
    tower.save_pretrained(tmp_path, **({"max_shard_size": size} if size else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == bool(size)
    loaded = load(tmp_path)
    assert type(loaded) is FusedMixpertTower
    assert not loaded.training
    state = tower.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state[name]), name
    for name, buffer in loaded.named_buffers():  # also those that no checkpoint holds
        assert torch.equal(buffer, tower.get_buffer(name)), name
    assert_close(features(loaded, kind), features(tower, kind))


OPTIONS = {
    "num_experts": 2,
    "expert_layers": 1,
    "routing": "score_threshold",
    "tau": 0.25,
    "delta": 0.75,
    "against": "versatile",
    "feature_layer": -2,
    "router_hidden": 6,
    "fuse_trunk": False,
    "expert_names": ["any", "chart"],
}


def test_every_option_is_kept(tmp_path: Path) -> None:
    tower = make("siglip", **OPTIONS)
    tower.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    for name, value in OPTIONS.items():
        assert getattr(loaded.config, name) == value, name
    fields = [c.vision_config.to_dict() | {"dtype": 0} for c in (loaded.config, tower.config)]
    assert fields[0] == fields[1]
    assert loaded.router.hidden.out_features == 6
    images = pixels(3, (30, 30))
    with torch.no_grad():
        assert_close(loaded.eval()(images).router_scores, tower(images).router_scores)


def test_final_norm_is_saved_and_an_unused_one_is_not(tmp_path: Path) -> None:
    tower = make("siglip", final_norm=True)
    tower.save_pretrained(tmp_path / "with")
    assert any("post_layernorm" in key for key in load_file(tmp_path / "with" / WEIGHTS))
    assert_close(features(load(tmp_path / "with")), features(tower))
    make("siglip").save_pretrained(tmp_path / "without")
    assert not any("post_layernorm" in key for key in load_file(tmp_path / "without" / WEIGHTS))


def test_auto_classes(saved) -> None:
    path, tower = saved
    assert type(AutoConfig.from_pretrained(path)) is MixpertVisionConfig
    loaded = AutoModel.from_pretrained(path)
    assert type(loaded) is FusedMixpertTower
    assert_close(features(loaded), features(tower))
    blank = AutoModel.from_config(AutoConfig.from_pretrained(path))
    assert blank.state_dict().keys() == tower.state_dict().keys()


def test_thresholds_may_be_overridden_on_load(saved) -> None:
    path, _ = saved
    assert load(path, delta=0.5).config.delta == 0.5
    assert load(path, config=MixpertVisionConfig.from_pretrained(path, tau=0.25)).config.tau == 0.25
    refused(lambda: load(path, delta=1.5), "delta", "[0, 1]", "1.5")


def test_loading_info_is_given_when_asked_for(saved) -> None:
    loaded, info = load(saved[0], output_loading_info=True)
    assert type(loaded) is FusedMixpertTower
    assert not info["missing_keys"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "bfloat16", torch.float64])
def test_dtype_on_load(dtype, saved) -> None:
    path, tower = saved
    loaded = load(path, dtype=dtype)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {p.dtype for p in loaded.parameters()} == {wanted}
    got = run(loaded.eval(), pixels(3, (30, 30)).to(wanted), ROUTES)
    assert_close(got.float(), features(tower), 1e-5 if wanted == torch.float64 else 0.1)


def test_dtype_is_kept_by_auto(tmp_path: Path) -> None:
    make("siglip").bfloat16().save_pretrained(tmp_path)
    assert {p.dtype for p in load(tmp_path, dtype="auto").parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
@pytest.mark.parametrize("kind", ["siglip", "dinov2"])
def test_device_map(device_map, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    tower = make(kind)
    tower.save_pretrained(tmp_path, max_shard_size="20KB")
    loaded = load(tmp_path, device_map=device_map)
    assert_close(features(loaded, kind), features(tower, kind))


def test_a_checkpoint_can_be_saved_from_where_it_was_loaded_to_itself(saved) -> None:
    path, tower = saved
    loaded = load(path)
    loaded.save_pretrained(path)
    assert_close(features(load(path)), features(tower))


def test_from_a_configuration_alone_nothing_is_uninitialised(monkeypatch) -> None:
    """Memory handed out uninitialised is NaN here; none may be left."""
    empty = torch.empty

    def poisoned(*args: object, **options: object) -> torch.Tensor:
        made = empty(*args, **options)
        return made.fill_(float("nan")) if made.is_floating_point() and not made.is_meta else made

    configs = [make(kind).config for kind in KINDS]
    monkeypatch.setattr(torch, "empty", poisoned)
    for config in configs:
        tower = FusedMixpertTower(config)
        for name, value in tower.state_dict().items():
            assert value.isfinite().all(), (config.vision_config.model_type, name)
        assert all(
            m.weight.std() > 0 for m in tower.modules() if type(m).__name__ == "GroupedLinear"
        )


def test_init_weights_covers_every_grouped_leaf() -> None:
    for kind in ("siglip", "dinov2", "internvl_rms", "aimv2"):
        tower = make(kind, router_hidden=5)
        names = {id(p): name for name, p in tower.named_parameters()}
        for part in (tower.experts, tower.projector, tower.router):
            with torch.no_grad():
                for parameter in part.parameters():
                    parameter.fill_(float("nan"))
            for module in part.modules():
                tower._init_weights(module)
            for parameter in part.parameters():
                if "parametrizations" not in names[id(parameter)]:
                    assert parameter.isfinite().all(), names[id(parameter)]


# Names of other versions of transformers


SPELLINGS = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_registers", "dinov2_swiglu"])
@pytest.mark.parametrize("shards", [None, "20KB"])
def test_the_other_spelling_of_dinov2_loads(kind: str, shards: str | None, tmp_path: Path) -> None:
    tower = make(kind)
    tower.save_pretrained(tmp_path, **({"max_shard_size": shards} if shards else {}))
    renamed = {}

    def other(key: str) -> str:
        for old, new in SPELLINGS.items():
            for one, two in ((old, new), (new, old)):
                if f".{one}." in key:
                    return key.replace(one, two)
        return key

    for file in tmp_path.glob("*.safetensors"):
        tensors = {other(key): value for key, value in load_file(file).items()}
        renamed |= dict.fromkeys(tensors, file.name)
        save_file(tensors, file, metadata={"format": "pt"})
    index = tmp_path / "model.safetensors.index.json"
    if shards:
        index.write_text(json.dumps({**json.loads(index.read_text()), "weight_map": renamed}))
    assert len(renamed.keys() - tower.state_dict().keys()) == 8 * 2 + 8 * 2
    loaded = load(tmp_path)
    assert loaded.state_dict().keys() == tower.state_dict().keys()
    assert_close(features(loaded, kind), features(tower, kind))


# Checkpoints that are not right


def drop(name: str):
    return lambda tensors: tensors.pop(name)


KEYS = [
    "experts.0.block.mlp.fc1.weight",
    "experts.1.block.layer_norm2.bias",
    "projector.block.2.bias",
    "router.out.weight",
    "trunk.encoder.layers.0.self_attn.q_proj.bias",
    "trunk.embeddings.position_embedding.weight",
]


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_key_is_named(key: str, saved) -> None:
    edit(saved[0], drop(key))
    refused(lambda: load(saved[0]), "from_pretrained", "missing", key)
    refused(lambda: AutoModel.from_pretrained(saved[0]), "missing", key)


def test_a_missing_loose_parameter_is_named(tmp_path: Path) -> None:
    make("dinov2").save_pretrained(tmp_path)
    keys = [k for k in load_file(tmp_path / WEIGHTS) if k.startswith("experts") and "lambda" in k]
    assert len(keys) == 4
    edit(tmp_path, drop(keys[0]))
    refused(lambda: load(tmp_path), "missing", keys[0])


def test_an_extra_key_is_named(saved) -> None:
    edit(saved[0], lambda t: t.update({"experts.0.block.mlp.fc3.weight": torch.ones(2)}))
    refused(lambda: load(saved[0]), "unexpected", "experts.0.block.mlp.fc3.weight")


@pytest.mark.parametrize("key", KEYS)
def test_a_key_of_another_shape_is_named(key: str, saved) -> None:
    edit(saved[0], lambda t: t.update({key: t[key][:-1].clone()}))
    refused(lambda: load(saved[0]), "from_pretrained", key)
    refused(lambda: load(saved[0], ignore_mismatched_sizes=True), "from_pretrained", key)


def test_another_number_of_experts_is_an_error(saved) -> None:
    edit_config(saved[0], num_experts=EXPERTS + 1)
    refused(lambda: load(saved[0]), "from_pretrained", "experts.")


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, 0.999])
def test_a_truncated_file_is_named(keep: float, saved) -> None:
    file = saved[0] / WEIGHTS
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    refused(lambda: load(saved[0]), "from_pretrained", str(file))


def test_missing_files_are_named(saved, tmp_path: Path) -> None:
    path, tower = saved
    refused(lambda: load(tmp_path / "nowhere"), "directory must exist", str(tmp_path / "nowhere"))
    (path / WEIGHTS).unlink()
    refused(lambda: load(path), WEIGHTS, str(path))
    (path / "config.json").unlink()
    refused(lambda: load(path), "config.json", str(path))
    tower.save_pretrained(path, max_shard_size="20KB")
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.unlink()
    refused(lambda: load(path), shard.name)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"metadata": {}}', '{"weight_map": 3}'])
def test_a_broken_index_is_named(text: str, tmp_path: Path) -> None:
    make("siglip").save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refused(lambda: load(tmp_path), "from_pretrained", "model.safetensors.index.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null"])
def test_a_broken_configuration_is_named(text: str, saved) -> None:
    (saved[0] / "config.json").write_text(text)
    refused(lambda: load(saved[0]), "from_pretrained", "config.json")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "siglip_vision_model"}, ("model_type", "mixpert_vision", "siglip_vision")),
        ({"model_type": None}, ("model_type", "mixpert_vision")),
        ({"mixpert_format": 2}, ("mixpert_format", "2", "version")),
        ({"num_experts": 0}, ("num_experts", "0")),
        ({"routing": "best"}, ("routing", "best")),
        ({"delta": 2}, ("delta", "[0, 1]", "2")),
        ({"expert_layers": 4}, ("expert_layers", "4")),
    ],
)
def test_a_configuration_of_something_else_is_named(fields: dict, words: tuple, saved) -> None:
    edit_config(saved[0], **fields)
    refused(lambda: load(saved[0]), *words)


def test_a_plain_transformers_checkpoint_is_refused(tmp_path: Path) -> None:
    KINDS["clip"].build().save_pretrained(tmp_path)
    refused(lambda: load(tmp_path), "model_type", "mixpert_vision", "clip_vision_model")


# Projectors that can't be saved


class Odd(nn.Module):
    """Has the parts of LLaVA's projector, and does something else with them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(WIDTH, WIDTH)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear_2(self.act(self.linear_1(x)))


def test_a_projector_that_cannot_be_rebuilt_is_not_saved_as_another(tmp_path: Path) -> None:
    model, head = KINDS["siglip"].build(), Odd()
    tower = FusedMixpertTower.from_vision_model(model, head, num_experts=2)
    images = pixels(2, (30, 30))
    assert_close(run(tower, images, [1, 0]), head(plain("siglip", model, images)).detach())
    refused(lambda: tower.save_pretrained(tmp_path / "t"), "save_pretrained", "projector", "Odd")
    assert not (tmp_path / "t").exists()
