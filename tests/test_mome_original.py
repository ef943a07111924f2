"""A checkpoint of the original's names, written by other modules, gives what those modules compute."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from _mome import (
    HOLDER,
    IDS,
    MASK,
    PROCESSORS,
    SENTENCE,
    SIZE,
    TEXTS,
    VISION,
    call,
    encoders,
    llm,
    logits,
    make,
    sentences,
    write_bert,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from mixpert_kernels.hf import mome
from mixpert_kernels.modules.mole import unstack_adapters
from mixpert_kernels.testing import assert_as_accurate, randomize_

WIDTH, HEADS, POINTS, FFN, LAYERS, K, HIDDEN = 16, 2, 2, 8, 2, 3, 4
ADT = {"layers": LAYERS, "heads": HEADS, "points": POINTS, "ffn": FFN}


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.add_module(name, nn.Linear(WIDTH, WIDTH))

    def forward(self, h: Tensor, u: Tensor) -> Tensor:  # (L, C)
        heads = [
            p.view(-1, HEADS, WIDTH // HEADS)
            for p in (self.q_proj(u), self.k_proj(u), self.v_proj(h))
        ]
        q, k, v = (t.transpose(0, 1) for t in heads)
        weights = (q @ k.transpose(1, 2) * (WIDTH // HEADS) ** -0.5).softmax(-1)
        return self.out_proj((weights @ v).transpose(0, 1).reshape(-1, WIDTH))


class EncoderAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sampling_offsets = nn.Linear(WIDTH, HEADS * POINTS * 2)
        self.attention_weights = nn.Linear(WIDTH, HEADS * POINTS)
        self.value_proj = nn.Linear(WIDTH, WIDTH)
        self.output_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, u: Tensor, f: Tensor, size: tuple[int, int], reference: Tensor) -> Tensor:
        height, width = size
        value = self.value_proj(f).view(height, width, HEADS, -1).permute(2, 3, 0, 1)
        offsets = self.sampling_offsets(u).view(-1, HEADS, POINTS, 2)
        weights = self.attention_weights(u).view(-1, HEADS, POINTS).softmax(-1)
        where = reference[:, None, None] + offsets / offsets.new_tensor([width, height])
        grid = (2 * where - 1).transpose(0, 1)  # (heads, L, points, 2), as (x, y)
        sampled = F.grid_sample(value, grid, padding_mode="zeros", align_corners=False)
        mixed = (sampled * weights.transpose(0, 1)[:, None]).sum(-1)  # (heads, d, L)
        return self.output_proj(mixed.permute(2, 0, 1).reshape(-1, WIDTH))


class SelectorLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.encoder_attn = SelfAttention(), EncoderAttention()
        self.fc1, self.fc2 = nn.Linear(WIDTH, FFN), nn.Linear(FFN, WIDTH)
        for name in ("self_attn", "encoder_attn", "final"):
            self.add_module(f"{name}_layer_norm", nn.LayerNorm(WIDTH))


class Selector(nn.Module):
    """The original's transform of one branch, image by image."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SelectorLayer() for _ in range(LAYERS))
        self.reference_points = nn.Parameter(torch.rand(1, SIZE * SIZE, 2))
        self.position_embeddings = nn.Parameter(torch.zeros(1, SIZE * SIZE, WIDTH))

    def forward(self, f: Tensor, size: tuple[int, int]) -> Tensor:
        image = f.view(1, *size, WIDTH).permute(0, 3, 1, 2)
        h = F.adaptive_avg_pool2d(image, SIZE).flatten(2)[0].T  # (L, C)
        position = self.position_embeddings[0]
        for layer in self.layers:
            h = layer.self_attn_layer_norm(h + layer.self_attn(h, h + position))
            seen = layer.encoder_attn(h + position, f, size, self.reference_points[0])
            h = layer.encoder_attn_layer_norm(h + seen)
            h = layer.final_layer_norm(h + layer.fc2(layer.fc1(h).relu()))
        return h


class Adapter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj, self.up_proj = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.up_proj(self.down_proj(x).relu())


class Mixture(nn.Module):
    """All K adapters, and a router whose best one counts."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(Adapter() for _ in range(K))
        self.router_mlp = _router(K)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        chosen = F.one_hot(self.router_mlp(s).argmax(-1), K).to(x.dtype)  # (B, K)
        every = torch.stack([adapter(x) for adapter in self.adapters], 1)  # (B, K, T, D)
        return (chosen[..., None, None] * every).sum(1)


def _router(count: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(SENTENCE, SENTENCE), nn.GELU(), nn.Linear(SENTENCE, count))


class Original(nn.Module):
    """What the original trains, under its names, around encoders and an LLM that are frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.dino_selector, self.pix_selector = Selector(), Selector()
        self.dino_llm_proj, self.pix_llm_proj, self.clip_proj = (
            nn.Linear(WIDTH, WIDTH) for _ in "123"
        )
        self.clip_ln = nn.LayerNorm(WIDTH)
        self.move_router = nn.ModuleDict({"router": _router(3)})
        self.llm_model = nn.ModuleDict({"model": nn.ModuleDict({"layers": _layers()})})

    def forward(self, given: dict, plain: nn.Module, vision: dict[str, nn.Module]) -> Tensor:
        s = sentences(TEXTS).to(self.clip_ln.weight.dtype)
        images = given["images"]
        clip = vision["clip"](**images["clip"]).last_hidden_state
        dino = vision["dino"](**images["dino"]).last_hidden_state[:, 1:]
        pix = vision["pix"](**images["pix"]).last_hidden_state
        ids = images["pix"]["flattened_patches"][..., :2].amax(1).long().tolist()
        clip = self.clip_proj(self.clip_ln(clip))
        shares = self.move_router["router"](s).softmax(-1)
        mixed = []
        for b, (height, width) in enumerate(ids):
            seen = [
                clip[b, 1:],
                self.dino_llm_proj(self.dino_selector(dino[b], (6, 6))),
                self.pix_llm_proj(self.pix_selector(pix[b, : height * width], (height, width))),
            ]
            one = sum(g * stream for g, stream in zip(shares[b], seen, strict=True))
            mixed.append(torch.cat([clip[b, :1], one]))
        text = plain.get_input_embeddings()
        words = text(IDS.clamp(max=20))
        rows = []
        for b in range(2):
            place = IDS[b].tolist().index(HOLDER)
            rows.append(torch.cat([words[b, :place], mixed[b], words[b, place + 1 :]]))
        mask = torch.cat(
            [MASK[:, :2], torch.ones(2, SIZE * SIZE, dtype=torch.long), MASK[:, 2:]], 1
        )
        handles = []
        for layer, own in zip(plain.model.layers, self.llm_model["model"]["layers"], strict=True):
            adapter = own["mlp"]["adapter"]
            add = lambda _, args, y, adapter=adapter: y + adapter(args[0], s)  # noqa: E731
            handles.append(layer.mlp.register_forward_hook(add))
        try:
            return plain(inputs_embeds=torch.stack(rows), attention_mask=mask).logits
        finally:
            for handle in handles:
                handle.remove()


def _layers() -> nn.ModuleList:
    return nn.ModuleList(
        nn.ModuleDict({"mlp": nn.ModuleDict({"adapter": Mixture()})}) for _ in range(2)
    )


@pytest.fixture(scope="module")
def original() -> Original:
    made = randomize_(Original(), 2)
    with torch.no_grad():
        for selector in (made.dino_selector, made.pix_selector):
            selector.reference_points.copy_(torch.rand(1, SIZE * SIZE, 2))
        for name, parameter in made.named_parameters():
            if "router" in name and parameter.ndim == 2:
                parameter.mul_(2)
    return made.eval()


def fresh(**options: object) -> mome.MomeForConditionalGeneration:
    return make(**{"options": ADT, "experts": K, "seed": 3} | options)


@torch.no_grad()
def by_the_original(original: Original, dtype: torch.dtype) -> Tensor:
    parts = (copy.deepcopy(original), llm(), *encoders().values())
    own, plain, *vision = (part.to(dtype) for part in parts)
    given = call(fresh())
    for name, key in (("clip", "pixel_values"), ("dino", "pixel_values")):
        given["images"][name][key] = given["images"][name][key].to(dtype)
    if dtype == torch.float64:  # Pix2Struct's ids come beside its pixels
        vision[2].embeddings.patch_projection.register_forward_pre_hook(
            lambda _, a: (a[0].double(),)
        )
    return own(given, plain, dict(zip(PROCESSORS, vision, strict=True)))


def test_the_names_are_the_originals(original):
    names = set(original.state_dict())
    for name in (
        "dino_selector.layers.1.self_attn.out_proj.weight",
        "pix_selector.layers.0.encoder_attn.sampling_offsets.bias",
        "pix_selector.layers.0.encoder_attn_layer_norm.weight",
        "dino_selector.reference_points",
        "move_router.router.2.weight",
        "clip_ln.bias",
        "llm_model.model.layers.1.mlp.adapter.adapters.2.down_proj.bias",
        "llm_model.model.layers.1.mlp.adapter.adapters.2.scale",
        "llm_model.model.layers.0.mlp.adapter.router_mlp.0.weight",
    ):
        assert name in names


def test_logits_are_the_originals(original):
    model = mome.load_original(fresh(), original.state_dict())
    plain, truth = (by_the_original(original, t) for t in (torch.float32, torch.float64))
    keep = torch.ones(2, plain.shape[1], dtype=torch.bool)
    keep[0, :2] = False  # padding
    assert_as_accurate("logits", logits(model)[keep], plain[keep], truth[keep])
    experts = mome.route(model, TEXTS).experts
    assert not torch.equal(*experts)
    points = model.move.branches["dino"].transform.reference_points
    assert torch.equal(points, original.dino_selector.reference_points)


def test_the_routers_weights_follow_the_models_order(original):
    state = original.state_dict()
    turned = dict(reversed(encoders().items()))
    model = mome.load_original(fresh(encoders=turned), state)
    assert model.branches == ["pix", "dino", "clip"]
    same = mome.load_original(fresh(), state)
    weights = mome.route(same, TEXTS).weights
    torch.testing.assert_close(mome.route(model, TEXTS).weights, weights.flip(1))
    assert not torch.allclose(weights, weights.flip(1), atol=1e-2)


def test_files_directories_and_an_llms_own_parameters(original, tmp_path):
    state = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    want = logits(mome.load_original(fresh(), state))
    torch.save({"model": state, "epoch": 3}, tmp_path / "original.pth")
    save_file(state, tmp_path / "original.safetensors")
    for name in ("original.pth", "original.safetensors"):
        assert torch.equal(logits(mome.load_original(fresh(), tmp_path / name)), want)

    trained = state | {"llm_model.model.norm.weight": torch.full((WIDTH,), 2.0)}
    trained["llm_model.model.layers.1.mlp.gate_proj.weight"] = torch.ones(24, WIDTH)
    model = mome.load_original(fresh(), trained)
    assert torch.equal(model.llm.model.norm.weight, torch.full((WIDTH,), 2.0))
    assert model.layers[1].ffn.gate_proj.weight.eq(1).all()

    with pytest.raises(ValueError, match="must be a file of the original's state dict, got"):
        mome.load_original(fresh(), tmp_path / "none.pth")


def test_from_directories_at_the_checkpoints_sizes(tmp_path):
    llm().save_pretrained(tmp_path / "llm")
    larger = {"hidden_size": 16, "image_size": 64}
    encoders()["dino"].save_pretrained(tmp_path / "dino")
    encoders()["pix"].save_pretrained(tmp_path / "pix")
    CLIPVisionModel(CLIPVisionConfig(**VISION | larger)).save_pretrained(tmp_path / "clip")
    model = mome.build(
        tmp_path / "llm",
        {name: tmp_path / name for name in PROCESSORS},
        experts=K,
        hidden=HIDDEN,
        options={"layers": 1, "ffn": FFN},
        sentence_width=SENTENCE,
    )
    state = as_original(randomize_(model.float(), 4))
    directories = {name: tmp_path / name for name in ("llm", *PROCESSORS)}
    directories["sentence_encoder"] = write_bert(tmp_path / "bert")
    made = mome.load_original(directories, state)
    got, own = made.own_parameters(), model.own_parameters()
    assert got.keys() == own.keys() and all(torch.equal(got[n], own[n]) for n in own)
    assert made.experts == K and made.options["clip"]["cls"]
    with pytest.raises(ValueError, match=r"directories of llm, clip, dino, pix .* got llm"):
        mome.load_original({"llm": tmp_path / "llm"}, state)


def as_original(model: mome.MomeForConditionalGeneration) -> dict[str, Tensor]:
    state = {f"move_router.router.{n}": t for n, t in model.move.router.state_dict().items()}
    for name, branch in model.move.branches.items():
        proj, norm = ("clip_proj", "clip_ln") if name == "clip" else (f"{name}_llm_proj", None)
        state |= {f"{proj}.{n}": t for n, t in branch.proj.state_dict().items()}
        if norm:
            state |= {f"{norm}.{n}": t for n, t in branch.norm.state_dict().items()}
        else:
            inside = branch.transform.state_dict().items()
            state |= {f"{name}_selector.{n}": t for n, t in inside}
    for i, layer in enumerate(model.layers):
        adapters = unstack_adapters(layer.state_dict()).items()
        state |= {f"llm_model.model.layers.{i}.mlp.adapter.{n}": t for n, t in adapters}
    return state


LAYER = "llm_model.model.layers.1.mlp.adapter."
FAULTS = {
    "K": ({}, {"experts": 4}, "must have the model's 4 adapters a layer, got 3"),
    "no adapters in the model": ({}, {"experts": 0}, "the model's 0 adapters a layer, got 3"),
    "a selector's name": (
        {"pix_selector.reference_points": None},
        {},
        r"missing keys: pix_selector\.ref",
    ),
    "an adapter's": (
        {f"{LAYER}adapters.1.scale": None},
        {},
        r"layers\.1\.mlp\.adapter\..*adapters\.1\.scale",
    ),
    "a router's": ({f"{LAYER}router_mlp.2.bias": None}, {}, r"missing keys: .*router\.2\.bias"),
    "an unknown name": ({"qformer.bert": torch.ones(1)}, {}, r"unexpected keys: qformer\.bert"),
    "an unknown adapter name": (
        {f"{LAYER}gate": torch.ones(1)},
        {},
        "original must hold nothing else",
    ),
    "a third layer": (
        {LAYER.replace("1", "2") + f"adapters.{k}.scale": torch.ones(1) for k in range(K)},
        {},
        r"unexpected keys: llm_model\.model\.layers\.2",
    ),
    "a shape": (
        {"clip_proj.bias": torch.ones(9)},
        {},
        r"clip_proj\.bias must have shape \(16,\), got \(9,\)",
    ),
    "a router's shape": (
        {"move_router.router.2.bias": torch.ones(2)},
        {},
        r"move_router\.router\.2\.bias must have shape \(3,\), got \(2,\)",
    ),
    "a branch without transform": (
        {},
        {"branches": {"dino": {"transform": "pool"}}},
        "'dino' must have a place for dino_selector, got transform 'pool'",
    ),
    "two branches": (
        {},
        {"encoders": dict(list(encoders().items())[:2]), "processors": None},
        "branches must tell which of the model's are clip, dino, pix, got .* for clip, dino",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_and_change_nothing(fault, original):
    change, options, text = FAULTS[fault]
    state = {n: t for n, t in (original.state_dict() | change).items() if t is not None}
    model = fresh(**options)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=text):
        mome.load_original(model, state)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_names_may_be_left_out_and_branches_called_otherwise(original):
    state = original.state_dict() | {"visual_encoder.cls_token": torch.ones(1)}
    renamed = {"sees": "clip", "finds": "dino", "reads": "pix"}
    own = encoders()
    model = fresh(encoders={name: own[kind] for name, kind in renamed.items()}, processors=None)
    given = {kind: name for name, kind in renamed.items()}
    mome.load_original(model, state, branches=given, ignore=["visual_encoder."])
    same = mome.load_original(fresh(), original.state_dict())
    assert torch.equal(mome.route(model, TEXTS).weights, mome.route(same, TEXTS).weights)
    ours, theirs = model.move.branches["reads"], same.move.branches["pix"]
    assert torch.equal(ours.transform.reference_points, theirs.transform.reference_points)
