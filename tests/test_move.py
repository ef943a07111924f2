"""MixtureOfVisionExperts against its formula written in plain PyTorch."""

from __future__ import annotations

import copy

import _adt
import pytest
import torch
import torch.nn.functional as F
from _towers import reference_only
from torch import Tensor, nn

from mixpert_kernels import Grids
from mixpert_kernels.modules import Features, MixtureOfVisionExperts, VisionBranch
from mixpert_kernels.testing import randomize_

D, S, SIZE = 10, 6, 3
WIDTHS = {"clip": 5, "dino": 8, "pix": 6}
SQUARE, DINO, PIX = [(SIZE, SIZE)] * 3, [(4, 4)] * 3, [(2, 7), (1, 5), (3, 3)]
GRIDS = {"clip": SQUARE, "dino": DINO, "pix": PIX}
BATCH = len(PIX)


class Encoder(nn.Module):
    """Linear, with dropout that must be off, of patches (R, 4); CLS is the mean of each image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(4, width), nn.Dropout(0.5)

    def forward(self, patches: Tensor, grids: Grids) -> Features:
        rows = self.drop(self.linear(patches))
        images = rows.split(grids.cu_seqlens.diff().tolist())
        return Features(rows, grids, torch.stack([image.mean(0) for image in images]))


def branch(name: str, **options: object) -> VisionBranch:
    defaults = {
        "clip": {"transform": "none", "norm": True, "cls": True},
        "dino": {"transform": "deformable", "layers": 2, "heads": 2, "ffn": 7},
        "pix": {"transform": "pool"},
    }[name]
    width = WIDTHS[name]
    return VisionBranch(Encoder(width), width, D, size=SIZE, **defaults | options)


def mixture(mix: str = "router", **branches: VisionBranch) -> MixtureOfVisionExperts:
    branches = branches or {name: branch(name) for name in WIDTHS}
    return randomize_(MixtureOfVisionExperts(branches, D, S, mix)).eval()


def inputs(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, dict]:
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, grids in GRIDS.items():
        rows = sum(height * width for height, width in grids)
        patches = torch.randn(rows, 4, generator=generator).to(dtype)
        made[name] = {"patches": patches, "grids": Grids.of(grids)}
    return made


def instructions(count: int = BATCH, seed: int = 0) -> Tensor:
    return torch.randn(count, S, generator=torch.Generator().manual_seed(seed)) * 2


def plain(move: MixtureOfVisionExperts, given: dict, s: Tensor) -> Tensor:
    """The formula of each branch and of the mixture; the transform by transformers' layers."""
    tokens = []
    for name, b in move.branches.items():
        patches, grids = given[name]["patches"], GRIDS[name]
        rows = F.linear(patches, b.encoder.linear.weight, b.encoder.linear.bias).detach()
        images = rows.split([height * width for height, width in grids])
        if name == "clip":
            h = torch.stack(images)
            cls = h.mean(1, keepdim=True)
            all_tokens = F.layer_norm(
                torch.cat([cls, h], 1), h.shape[-1:], b.norm.weight, b.norm.bias
            )
            first, h = F.linear(all_tokens, b.proj.weight, b.proj.bias).split([1, SIZE**2], 1)
            tokens.append(h)
            continue
        if name == "dino":
            h = _adt.by_transformers(b.transform, rows, grids)
        else:
            pairs = zip(images, grids, strict=True)
            h = torch.stack(
                [F.adaptive_avg_pool2d(i.T.unflatten(1, g), SIZE).flatten(1).T for i, g in pairs]
            )
        tokens.append(F.linear(h, b.proj.weight, b.proj.bias))
    if move.router is None:
        g = [1.0] * 3
    else:
        g = F.linear(s, move.router[0].weight, move.router[0].bias)
        g = F.linear(F.gelu(g), move.router[2].weight, move.router[2].bias).softmax(-1)
        g = g.T[..., None, None]
    return torch.cat([first, g[0] * tokens[0] + g[1] * tokens[1] + g[2] * tokens[2]], 1)


def results(compute, move: MixtureOfVisionExperts, given: dict, s: Tensor) -> dict[str, Tensor]:
    s = s.detach().requires_grad_()
    move.zero_grad()
    y = compute(move, given, s)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    trained = {n: p.grad for n, p in move.named_parameters() if ".encoder." not in n}
    found = {"y": y.detach(), "ds": s.grad} | trained
    return _adt.without_key_biases({n: t for n, t in found.items() if t is not None})


def given_in(dtype: torch.dtype, given: dict) -> dict:
    return {n: inputs | {"patches": inputs["patches"].to(dtype)} for n, inputs in given.items()}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mix", ["router", "addition"])
def test_equals_the_formula(mix, autocast):
    """Forward and every gradient."""
    move, given, s = mixture(mix), inputs(), instructions()
    double = given_in(torch.float64, given)
    truth = results(plain, copy.deepcopy(move).double(), double, s.double())
    with torch.autocast("cpu", torch.bfloat16, autocast):
        by_pytorch = results(plain, move, given, s)
        got = results(lambda m, given, s: m(given, s), move, given, s)
    assert got["y"].shape == (BATCH, 1 + SIZE**2, D)
    if autocast:  # in which a gradient hangs on which patches a point is rounded to lie between
        assert got.keys() == truth.keys()
        got, by_pytorch, truth = ({"y": found["y"]} for found in (got, by_pytorch, truth))
    _adt.assert_same(got, by_pytorch, truth, None if autocast else 1e-5)
    frozen = [p for n, p in move.named_parameters() if ".encoder." in n]
    assert frozen and not any(p.requires_grad for p in frozen)


def test_encoders_stay_in_evaluation_mode_without_autograd():
    move, given = mixture(), inputs()
    move.train()
    assert move.branches["dino"].transform.training
    assert not any(m.training for b in move.branches.values() for m in b.encoder.modules())
    move.requires_grad_()
    features = move.branches["dino"].encode(given["dino"])
    assert not features.rows.requires_grad
    assert torch.equal(features.rows, move.branches["dino"].encode(given["dino"]).rows)


def test_features_made_before_serve_as_well_as_inputs():
    move, given, s = mixture(), inputs(), instructions()
    made = {name: b.encode(given[name]) for name, b in move.branches.items()}
    assert torch.equal(move(made, s), move(given, s))


def test_weights_are_those_of_the_mix():
    """Streams that are constant show which weight each of them has."""
    move, given = mixture(), inputs()
    for i, b in enumerate(move.branches.values()):
        nn.init.zeros_(b.proj.weight)
        nn.init.constant_(b.proj.bias, 0.0)
        b.proj.bias.data[i] = 1.0
    g = move.weights(instructions())
    y = move(given, instructions())
    torch.testing.assert_close(g.sum(1), torch.ones(BATCH))
    torch.testing.assert_close(y[:, 1:, :3], g[:, None].expand(-1, SIZE**2, -1))
    assert torch.equal(y[:, 0, :3], torch.tensor([[1.0, 0.0, 0.0]] * BATCH))  # CLS: not routed
    added = mixture("addition").weights(instructions())
    assert torch.equal(added, torch.ones(BATCH, 3))


def test_without_a_cls_there_is_no_token_before_the_mix():
    branches = {"clip": branch("clip", cls=False), "pix": branch("pix")}
    for mix in ("router", "addition"):
        given = {name: inputs()[name] for name in branches}
        assert mixture(mix, **branches)(given, instructions()).shape == (BATCH, SIZE**2, D)


def test_addition_needs_no_instruction():
    move, given = mixture("addition"), inputs()
    assert move.router is None
    assert torch.equal(move(given, None), move(given, instructions()))


@pytest.mark.parametrize("transform", ["deformable", "standard", "pool"])
def test_every_transform_gives_tokens_of_one_shape(transform):
    made = randomize_(branch("dino", transform=transform))
    tokens, cls = made(made.encode(inputs()["pix"] | {}))
    assert tokens.shape == (BATCH, SIZE**2, D) and cls is None
    assert (made.transform is None) == (transform == "pool")


def test_features_of_another_dtype_are_computed_in_the_parameters():
    move, s = mixture(), instructions()
    for b in move.branches.values():
        b.encoder.bfloat16()
    y = move(inputs(dtype=torch.bfloat16), s)
    assert y.dtype == torch.float32
    move = move.bfloat16()
    assert move(inputs(dtype=torch.bfloat16), s).dtype == torch.bfloat16


@pytest.mark.usefixtures("one_thread")
def test_an_image_alone_is_bitwise_as_in_a_batch(monkeypatch):
    reference_only(monkeypatch)
    move, s = mixture(), instructions()
    with torch.no_grad():
        made = {
            name: b.encode(given)
            for (name, b), given in zip(move.branches.items(), inputs().values(), strict=True)
        }
        batch = move(made, s)
        for i in range(BATCH):
            one = {}
            for name, f in made.items():
                lo, hi = f.grids.cu_seqlens[i : i + 2].tolist()
                one[name] = Features(
                    f.rows[lo:hi].clone(), Grids.of(GRIDS[name][i : i + 1]), f.cls[i : i + 1]
                )
            assert torch.equal(move(one, s[i : i + 1].clone())[0], batch[i])


def test_names_of_the_state_dict():
    names = {n for n in mixture().state_dict() if ".encoder." not in n and ".layers." not in n}
    leaves = ["clip.norm", "clip.proj", "dino.proj", "pix.proj"]
    wanted = {f"branches.{leaf}.{p}" for leaf in leaves for p in ("weight", "bias")}
    wanted |= {f"router.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")}
    wanted |= {f"branches.dino.transform.{n}" for n in ("reference_points", "position_embeddings")}
    assert names == wanted


def other(count: int) -> dict:
    grids = {name: Grids.of(sizes[:1] * count) for name, sizes in GRIDS.items()}
    return {
        n: {"patches": torch.zeros(int(g.cu_seqlens[-1]), 4), "grids": g} for n, g in grids.items()
    }


CALLS = {
    "missing": (
        lambda m: m({n: g for n, g in inputs().items() if n != "dino"}, instructions()),
        "inputs must be of the branches clip, dino, pix, got none of dino",
    ),
    "unknown": (
        lambda m: m(inputs() | {"eva": {}}, instructions()),
        "inputs must be of the branches clip, dino, pix, got eva",
    ),
    "instructions": (
        lambda m: m(inputs(), instructions(2)),
        "instruction must be one for each of the 3 images of 'clip', got 2",
    ),
    "images": (
        lambda m: m(inputs() | {"pix": other(4)["pix"]}, instructions()),
        "instruction must be one for each of the 4 images of 'pix', got 3",
    ),
    "width": (
        lambda m: m(inputs(), torch.zeros(3, 7)),
        r"instruction must have shape \(B, 6\), got \(3, 7\)",
    ),
    "text": (lambda m: m(inputs(), "what?"), r"instruction must have shape \(B, 6\), got what\?"),
    "no instruction": (lambda m: m(inputs(), None), r"instruction must have shape \(B, 6\), got None"),
    "weights": (lambda m: m.weights(torch.zeros(6)), r"instruction must have shape \(B, 6\), got \(6,\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_calls_that_do_not_fit_are_refused(case):
    call, message = CALLS[case]
    with pytest.raises(ValueError, match=f"^MixtureOfVisionExperts: {message}$"):
        call(mixture())


def test_what_makes_no_mixture_is_refused():
    clip = branch("clip")
    narrow = VisionBranch(Encoder(5), 5, D + 1, transform="pool", size=SIZE)
    coarse = VisionBranch(Encoder(5), 5, D, transform="pool", size=SIZE + 1)
    for made, options, message in (
        ({}, {}, "branches must hold at least one, got none"),
        ({"clip": clip}, {"mix": "mean"}, "mix must be one of router, addition, got mean"),
        (
            {"a": narrow},
            {},
            r"branches must give width 10 on a grid of one size, got \[\('a', 11, 3\)\]",
        ),
        ({"a": clip, "b": coarse}, {}, "branches must give width 10 on a grid of one size, got .*"),
        (
            {"a": clip, "b": branch("clip")},
            {},
            r"branches must have at most one with cls, got \['a', 'b'\]",
        ),
    ):
        with pytest.raises(ValueError, match=f"^MixtureOfVisionExperts: {message}$"):
            MixtureOfVisionExperts(made, D, S, **options)


def test_features_that_make_no_tokens_are_refused():
    clip, rows = branch("clip"), torch.zeros(9, 5)
    grids, cls = Grids.of([(3, 3)]), torch.zeros(1, 5)
    long = Grids.of([(1, 9)])
    for features, message in (
        (
            Features(rows, long, cls),
            "grids must be 3 x 3 each where there is no transform, got 1 x 9",
        ),
        (Features(rows[:8], Grids.of([(2, 4)]), cls), "grids must be 3 x 3 each .*, got 8 rows"),
        (Features(rows, grids), r"cls must have shape \(1, 5\), got None"),
        (Features(rows, grids, cls[0]), r"cls must have shape \(1, 5\), got \(5,\)"),
        (Features(rows[:, :4], grids, cls), r"rows must have shape \(R, 5\), got \(9, 4\)"),
    ):
        with pytest.raises(ValueError, match=rf"^VisionBranch: features\.{message}$"):
            clip(features)
    with pytest.raises(
        ValueError, match=r"^VisionBranch: grids must have as many rows .* 9 rows .* 3 x 4$"
    ):
        clip(Features(rows, grids._replace(sizes=torch.tensor([[3, 4]], dtype=torch.int32)), cls))
    with pytest.raises(ValueError, match=r"^VisionBranch: transform must be one of .*, got max$"):
        branch("clip", transform="max")
    with pytest.raises(ValueError, match=r"^VisionBranch: size must be at least 1, got 0$"):
        VisionBranch(Encoder(5), 5, D, transform="pool", size=0)


def test_more_branches_than_can_be_mixed_are_refused_when_made():
    branches = {
        str(i): VisionBranch(nn.Identity(), 4, 4, transform="pool", size=2) for i in range(9)
    }
    with pytest.raises(ValueError, match="branches must be at most 8 beside a router, got 9"):
        MixtureOfVisionExperts(branches, 4)
    assert len(MixtureOfVisionExperts(branches, 4, mix="addition").branches) == 9
