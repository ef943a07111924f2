"""AdaptiveDeformableTransform against transformers' Deformable-DETR layers and nn.MultiheadAttention."""

from __future__ import annotations

import collections
import copy

import _adt
import pytest
import torch
import torch.nn.functional as F
from _towers import reference_only
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from mixpert_kernels import Grids
from mixpert_kernels.modules import AdaptiveDeformableTransform
from mixpert_kernels.ops import adaptive_pool

RAGGED = [(3, 5), (1, 2048), (45, 45), (4, 4), (20, 2), (1, 1)]
SMALL = [(3, 5), (1, 9), (7, 2)]
both_kinds = pytest.mark.parametrize("cross", ["deformable", "standard"])


@both_kinds
def test_equals_a_composition_of_other_peoples_layers(cross):
    """Forward and every gradient."""
    adt, f, oracle = _adt.transform(cross=cross), _adt.features(RAGGED), _adt.ORACLES[cross]
    truth = _adt.results(oracle, copy.deepcopy(adt).double(), f.double(), RAGGED)
    got, plain = (_adt.results(way, adt, f, RAGGED) for way in (_adt.ours, oracle))
    _adt.assert_same(got, plain, truth, 1e-5)


@both_kinds
def test_autocast_is_as_accurate_as_pytorchs(cross):
    """The output: in half precision a gradient hangs on which patches a point is rounded to lie between."""
    adt, f, oracle = _adt.transform(cross=cross), _adt.features(SMALL), _adt.ORACLES[cross]
    truth = _adt.results(oracle, copy.deepcopy(adt).double(), f.double(), SMALL)["y"]
    with torch.autocast("cpu", torch.bfloat16):
        got, plain = (_adt.results(way, adt, f, SMALL) for way in (_adt.ours, oracle))
    _adt.assert_same({"y": got["y"]}, {"y": plain["y"]}, {"y": truth}, None)
    assert {n: g.dtype for n, g in got.items()} == {n: g.dtype for n, g in plain.items()}
    assert all(g.isfinite().all() and g.any() for g in got.values())


@both_kinds
def test_float64_differs_by_rounding_alone(cross):
    adt, f = _adt.transform(cross=cross).double(), _adt.features(RAGGED).double()
    got, truth = (_adt.results(way, adt, f, RAGGED) for way in (_adt.ours, _adt.ORACLES[cross]))
    for name in truth:
        assert (got[name] - truth[name]).norm() <= 1e-10 * truth[name].norm(), name


def test_parameters_have_the_names_of_the_original():
    adt = AdaptiveDeformableTransform(16, layers=2, heads=2)
    shapes = {name: tuple(p.shape) for name, p in adt.state_dict().items()}
    assert shapes.pop("reference_points") == (1, 256, 2)
    assert shapes.pop("position_embeddings") == (1, 256, 16)
    leaves = [f"self_attn.{n}_proj" for n in ("q", "k", "v", "out")]
    offsets, points = "encoder_attn.sampling_offsets", "encoder_attn.attention_weights"
    leaves += [offsets, points, "encoder_attn.value_proj", "encoder_attn.output_proj"]
    leaves += ["fc1", "fc2", *(f"{n}_layer_norm" for n in ("self_attn", "encoder_attn", "final"))]
    wanted = {f"layers.{i}.{n}.{p}" for i in (0, 1) for n in leaves for p in ("weight", "bias")}
    assert shapes.keys() == wanted
    assert shapes[f"layers.1.{offsets}.weight"] == (2 * 4 * 2, 16)
    assert shapes[f"layers.1.{points}.bias"] == (2 * 4,)
    assert shapes["layers.0.fc1.weight"] == (1024, 16)


@both_kinds
def test_a_fresh_layer_is_three_layer_norms(cross):
    adt = AdaptiveDeformableTransform(24, layers=3, heads=2, ffn=8, cross=cross).eval()
    f, grids = _adt.features(SMALL, 24), Grids.of(SMALL)
    h = adaptive_pool(f, grids)
    for _ in range(3 * 3):
        h = F.layer_norm(h, (24,))
    assert torch.equal(adt(f, grids), h)


def test_a_fresh_one_looks_in_eight_directions_around_a_grid_with_both_ends():
    adt = AdaptiveDeformableTransform(16, layers=1)
    reference = adt.reference_points.view(16, 16, 2)
    side = torch.arange(16) / 15
    torch.testing.assert_close(reference[3, :, 0], side)  # x along a row of queries
    torch.testing.assert_close(reference[:, 3, 1], side)
    leaf = adt.layers[0].encoder_attn.sampling_offsets
    offsets = leaf.bias.view(8, 4, 2)
    right, diagonal, down = offsets[0], offsets[1], offsets[2]
    steps = torch.arange(1.0, 5.0)
    torch.testing.assert_close(right, torch.stack([steps, 0 * steps], -1))
    torch.testing.assert_close(diagonal, torch.stack([steps, steps], -1))
    torch.testing.assert_close(down, torch.stack([0 * steps, steps], -1))
    weights = adt.layers[0].encoder_attn.attention_weights
    assert not any(t.any() for t in (leaf.weight, weights.weight, weights.bias))
    assert not adt.position_embeddings.any()


@pytest.mark.usefixtures("one_thread")
def test_an_image_alone_is_bitwise_as_in_a_batch(monkeypatch):
    reference_only(monkeypatch)
    adt, f = _adt.transform(width=48, heads=8, size=16, ffn=20), _adt.features(RAGGED, 48)
    with torch.no_grad():
        batch = adt(f, Grids.of(RAGGED))
        for b, image in enumerate(f.split([height * width for height, width in RAGGED])):
            assert torch.equal(adt(image.clone(), Grids.of(RAGGED[b : b + 1]))[0], batch[b])


class Calls(TorchDispatchMode):
    """Counts the ops of this library."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mixpert":
            self.counts[func.__name__.split(".")[0]] += 1
        return func(*args, **kwargs or {})

    def __enter__(self):
        self.counts = collections.Counter()
        return super().__enter__()


@pytest.mark.parametrize("grids", [SMALL, [(2, 2)] * 7])
def test_the_values_of_all_layers_are_one_product_whatever_the_batch(grids):
    adt = _adt.transform(layers=3)
    with Calls() as calls, torch.no_grad():
        adt(_adt.features(grids), Grids.of(grids))
    once = {"adaptive_pool": 1, "grouped_linear": 1 + 3 * 5, "deform_attn": 3, "grouped_mlp": 3}
    assert calls.counts == once


def test_dropout_is_of_what_each_part_of_a_layer_adds(monkeypatch):
    rates = []

    def drop_all(x, p=0.5, training=True, inplace=False):
        rates.append(p if training else 0.0)
        return torch.zeros_like(x)

    adt, f, grids = _adt.transform(dropout=0.25), _adt.features(SMALL), Grids.of(SMALL)
    before = adt(f, grids)
    monkeypatch.setattr(F, "dropout", drop_all)
    assert torch.equal(adt(f, grids), before) and not rates  # evaluation
    h = adaptive_pool(f, grids, height=4, width=4)
    for layer in adt.layers:
        for name in ("self_attn", "encoder_attn", "final"):
            h = getattr(layer, f"{name}_layer_norm")(h)
    assert torch.equal(adt.train()(f, grids), h)
    assert rates == [0.25] * 6


def test_compiles_as_one_graph_for_any_batch():
    adt, counter = _adt.transform(layers=1), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(adt, fullgraph=True, dynamic=True, backend=counter)
    compiled_after = []
    for grids in (SMALL, RAGGED[:1] * 4):
        f = _adt.features(grids)
        got = _adt.results(lambda _, f, grids: compiled(f, Grids.of(grids)), adt, f, grids)
        eager = _adt.results(_adt.ours, adt, f, grids)
        for name in eager:
            torch.testing.assert_close(got[name], eager[name], rtol=1e-5, atol=1e-5)
        compiled_after.append(counter.frame_count)
    assert compiled_after[0] == compiled_after[1]


@both_kinds
def test_a_replaced_or_hooked_leaf_is_called(cross):
    adt, f, grids = _adt.transform(cross=cross), _adt.features(SMALL), Grids.of(SMALL)
    names = [n for n, m in adt.named_modules() if isinstance(m, nn.Linear)]
    before = adt(f, grids)
    for name in names:
        other = copy.deepcopy(adt)
        owner, _, leaf = name.rpartition(".")
        setattr(other.get_submodule(owner), leaf, nn.Sequential(adt.get_submodule(name)))
        torch.testing.assert_close(other(f, grids), before, rtol=1e-4, atol=1e-5)
        handle = adt.get_submodule(name).register_forward_hook(lambda *args: args[-1] * 1.5)
        hooked = adt(f, grids)
        handle.remove()
        assert not torch.allclose(hooked, before, atol=1e-4), name


ERRORS = {
    "heads": ({"heads": 5}, "width must be a multiple of heads, 5, got 16"),
    "layers": ({"layers": 0}, "layers must be at least 1, got 0"),
    "points": ({"points": -1}, "points must be at least 1, got -1"),
    "size": ({"size": 0}, "size must be at least 1, got 0"),
    "dropout": ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
    "cross": ({"cross": "none"}, "cross must be one of deformable, standard, got none"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_numbers_that_make_no_transform_are_refused(case):
    options, message = ERRORS[case]
    with pytest.raises(ValueError, match=f"^AdaptiveDeformableTransform: {message}$"):
        AdaptiveDeformableTransform(16, **{"heads": 2} | options)


@pytest.mark.parametrize(
    ("shape", "grids", "message"),
    [
        ((15, 11), [(3, 5)], r"f must have shape \(R, 16\), got \(15, 11\)"),
        ((1, 15, 16), [(3, 5)], r"f must have shape \(R, 16\), got \(1, 15, 16\)"),
        ((16, 16), [(3, 5)], r"cu_seqlens must ascend from 0 to the 16 rows of f, got \[0, 15\]"),
    ],
)
def test_features_that_do_not_fit_are_refused(shape, grids, message):
    with pytest.raises(ValueError, match=rf"^AdaptiveDeformableTransform: (grids\.)?{message}$"):
        _adt.transform()(torch.zeros(shape), Grids.of(grids))


def test_rows_that_are_not_h_times_w_are_refused():
    grids = Grids.of([(3, 5)])._replace(sizes=torch.tensor([[4, 4]], dtype=torch.int32))
    with pytest.raises(ValueError, match="15 rows for image 0 of 4 x 4"):
        _adt.transform()(torch.zeros(15, 16), grids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moves_to_other_dtypes(dtype):
    adt, f = _adt.transform().to(dtype), _adt.features(SMALL).to(dtype)
    with torch.no_grad():
        got, plain = (way(adt, f, SMALL) for way in (_adt.ours, _adt.by_transformers))
        truth = _adt.by_transformers(adt.double(), f.double(), SMALL)
    assert got.dtype == dtype
    _adt.assert_same({"y": got}, {"y": plain}, {"y": truth}, None)
