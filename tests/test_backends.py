"""Choosing a backend, the CPU backend's packed weights, and that the suite's poison bites."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from mixpert_kernels import Routing
from mixpert_kernels.backends import BACKENDS, pick, reference, why_not
from mixpert_kernels.backends.cpu import native, packing
from mixpert_kernels.ops import grouped_linear
from mixpert_kernels.testing import assert_as_accurate, randomize_

OPS = ("route", "grouped_linear", "grouped_layer_norm")
ROUTING = Routing.forced(torch.tensor([1, 0, 1]), 2)
needs_onednn = pytest.mark.skipif(
    why_not("grouped_linear", "cpu", device="cpu", dtype=torch.float32) is not None,
    reason="this PyTorch was built without oneDNN",
)


@pytest.fixture(autouse=True)
def nothing_packed():
    packing.clear()
    yield
    packing.clear()


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_uninitialised_memory_is_nan():
    x = torch.ones(2, 3)
    for fresh in (
        torch.empty(4),
        x.new_empty(2),
        torch.empty_like(x),
        torch.ones(1).resize_(9)[1:],
    ):
        assert fresh.isnan().all()
    assert torch.ops.aten.empty_like(x).isnan().all()


@pytest.mark.parametrize("op", OPS)
def test_the_reference_runs_everything_and_auto_finds_a_backend(op):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for device in ("cpu", "cuda"):
            assert why_not(op, "reference", device=device, dtype=dtype) is None
            assert pick(op, "auto", device=device, dtype=dtype).__name__.endswith(f".{op}")


@needs_onednn
def test_auto_takes_the_first_backend_that_can():
    assert pick("grouped_linear", "auto", device="cpu", dtype=torch.float32).__name__ == (
        "mixpert_kernels.backends.cpu.grouped_linear"
    )
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        assert pick("grouped_linear", "auto", device=device, dtype=dtype).__name__ == (
            "mixpert_kernels.backends.reference.grouped_linear"
        )


@needs_onednn
def test_a_named_backend_never_falls_back_and_says_why_it_cannot():
    with pytest.raises(RuntimeError) as error:
        grouped_linear(rand(3, 2, 4).double(), rand(2, 4, 4).double(), None, ROUTING, backend="cpu")
    assert str(error.value) == (
        "grouped_linear: no backend can run this call\n  cpu: has no torch.float64"
    )
    with pytest.raises(RuntimeError, match="cpu: needs a CPU tensor, got cuda"):
        pick("grouped_linear", "cpu", device="cuda", dtype=torch.float32)
    with pytest.raises(RuntimeError, match="cpu: has no route"):
        pick("route", "cpu", device="cpu", dtype=torch.float32)


def test_an_unknown_backend_is_named_with_the_known_ones():
    with pytest.raises(RuntimeError) as error:
        grouped_linear(rand(3, 2, 4), rand(2, 4, 4), None, ROUTING, backend="fast")
    assert f"fast: unknown backend; there are {', '.join(BACKENDS)}" in str(error.value)


def test_auto_lists_every_backend_with_its_reason_when_none_can(monkeypatch):
    monkeypatch.setattr(reference, "why_not", lambda op, device, dtype: "is out for lunch")
    with pytest.raises(RuntimeError) as error:
        pick("grouped_linear", "auto", device="meta", dtype=torch.float32)
    assert str(error.value).splitlines() == [
        "grouped_linear: no backend can run this call",
        "  cpu: needs a CPU tensor, got meta",
        "  triton: needs a CUDA or ROCm tensor, got meta",
        f"  cuda: {why_not('grouped_linear', 'cuda', device='meta', dtype=torch.float32)}",
        "  reference: is out for lunch",
    ]


class Layer(nn.Module):
    """A grouped linear layer with everything that is packed with it."""

    def __init__(self, seed=0):
        super().__init__()
        self.weight = nn.Parameter(rand(2, 48, 40, seed=seed))
        self.bias = nn.Parameter(rand(2, 48, seed=seed + 1))
        self.scale = nn.Parameter(rand(2, 48, seed=seed + 2))

    def forward(self, x, backend="cpu", activation="none"):
        options = {"scale": self.scale, "activation": activation, "backend": backend}
        return grouped_linear(x, self.weight, self.bias, ROUTING, **options)


X = rand(3, 5, 40, seed=9)


def optimizer_step(layer):
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer(X).square().mean().backward()
    optimizer.step()


def in_place(name):
    def change(layer):
        with torch.no_grad():
            getattr(layer, name)[1].mul_(2)

    return change


def one_value_in_place(layer):
    """Not among the sampled ones: the version alone tells."""
    with torch.no_grad():
        layer.weight[1, 0, 1] += 100


def through_data(layer):
    for parameter in layer.parameters():
        parameter.data.mul_(1.0 + 2**-20)


def new_data(layer):
    for parameter in layer.parameters():
        parameter.data = parameter.data * 2


def swapped_in_place(layer):
    """The sum of all values, and that of each expert, stay as they were."""
    layer.weight.data.copy_(layer.weight.data.flip(1))


CHANGES = {
    "optimizer step": optimizer_step,
    "load_state_dict": lambda layer: layer.load_state_dict(Layer(seed=5).state_dict()),
    "load_state_dict, assigned": lambda layer: layer.load_state_dict(
        Layer(seed=5).state_dict(), assign=True
    ),
    "weight in place": in_place("weight"),
    "bias in place": in_place("bias"),
    "scale in place": in_place("scale"),
    "one value in place": one_value_in_place,
    "param.data in place": through_data,
    "param.data replaced": new_data,
    "param.data swapped": swapped_in_place,
    "dtype there and back": lambda layer: layer.bfloat16().float(),
    "randomize_": lambda layer: randomize_(layer, seed=3),
}


@needs_onednn
@pytest.mark.parametrize("change", CHANGES)
def test_weights_are_packed_again_when_they_change(change):
    layer = Layer()
    with torch.no_grad():
        before = layer(X)
    CHANGES[change](layer)
    with torch.no_grad():
        after, wanted = layer(X), layer(X, "reference")
    assert not torch.equal(after, before)
    packing.clear()
    with torch.no_grad():
        assert torch.equal(after, layer(X))  # bit by bit what a new packing gives
    torch.testing.assert_close(after, wanted, rtol=1e-4, atol=1e-4)


@needs_onednn
def test_weights_are_packed_once(monkeypatch):
    packs = []
    pack = packing._pack
    monkeypatch.setattr(packing, "_pack", lambda *args: packs.append(args) or pack(*args))
    layer = Layer()
    with torch.no_grad():
        for _ in range(3):
            layer(X)
        assert len(packs) == 2  # an expert each
        layer.weight.add_(1)
        layer(X)
        layer(X)
    assert len(packs) == 4
    with torch.inference_mode():
        layer(X)
    assert len(packs) == 4
    assert packing.packed_bytes() == layer.weight.nbytes


@needs_onednn
@pytest.mark.parametrize("needs", ["weight", "bias", "scale", "x"])
def test_nothing_is_packed_when_a_gradient_is_needed(needs):
    layer, x = Layer().requires_grad_(False), X.clone()
    (x if needs == "x" else getattr(layer, needs)).requires_grad_()
    layer(x, activation="gelu").sum().backward()
    assert packing.packed_bytes() == 0
    layer(x.detach(), activation="gelu").sum()
    assert (packing.packed_bytes() > 0) == (needs == "x")


@needs_onednn
def test_packed_weights_are_freed_with_the_weights():
    first, second = Layer(), Layer(seed=7)
    with torch.no_grad():
        first(X), second(X)
        assert packing.packed_bytes() == first.weight.nbytes + second.weight.nbytes
        del first
        gc.collect()
        assert packing.packed_bytes() == second.weight.nbytes
        other = Layer(seed=8)  # may lie where the first one lay
        torch.testing.assert_close(other(X), other(X, "reference"), rtol=1e-4, atol=1e-4)


@needs_onednn
def test_new_weights_at_an_old_address_are_packed_anew():
    """Their first values agree, so that only the storage tells them apart."""
    for value in range(20):
        weight = torch.ones(1, 64, 64)
        weight[0, :, 1] = value
        with torch.no_grad():
            y = grouped_linear(torch.ones(1, 1, 64), weight, None, Routing.single(1), backend="cpu")
        assert y[0, 0, 0] == 63 + value
        del weight, y


@needs_onednn
def test_tensors_of_inference_mode_have_no_version_and_are_not_packed():
    with torch.inference_mode():
        layer = Layer()
        before = layer(X)
        layer.weight[1, 7, 7] += 100  # not among the sampled values
        torch.testing.assert_close(layer(X), layer(X, "reference"), rtol=1e-4, atol=1e-4)
        assert not torch.equal(layer(X), before)
    assert packing.packed_bytes() == 0


@needs_onednn
@pytest.mark.parametrize("is_native", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "quick_gelu", "relu"])
@pytest.mark.parametrize("residual, scaled", [(True, True), (True, False), (False, True)])
def test_half_precision_is_as_accurate_with_and_without_the_instructions(
    dtype, is_native, activation, residual, scaled, monkeypatch
):
    """LayerScale folded into the weights included."""
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    if is_native and not supported[dtype]():
        pytest.skip(f"oneDNN has no {dtype} on this CPU")
    monkeypatch.setitem(native.NATIVE, dtype, is_native)
    assert native.compute_dtype(dtype) == (dtype if is_native else torch.float32)
    p = [rand(3, 17, 72), rand(2, 40, 72, seed=1), rand(2, 40, seed=2)]
    p += [rand(3, 17, 40, seed=3) if residual else None, rand(2, 40, seed=4) if scaled else None]
    p = [None if t is None else t.to(dtype) for t in p]

    def run(backend, dtype):
        x, weight, bias, residual, scale = (None if t is None else t.to(dtype) for t in p)
        options = {"activation": activation, "residual": residual, "scale": scale}
        return grouped_linear(x, weight, bias, ROUTING, **options, backend=backend)

    got = run("cpu", dtype)
    assert got.dtype == dtype
    assert_as_accurate("y", got, run("reference", dtype), run("reference", torch.float64))


@needs_onednn
def test_the_scale_is_folded_only_where_nothing_stands_between():
    layer = Layer()
    with torch.no_grad():
        for activation in ("none", "relu"):
            wanted = layer(X, "reference", activation)
            torch.testing.assert_close(layer(X, "cpu", activation), wanted, rtol=1e-4, atol=1e-4)


@needs_onednn
def test_one_tensor_as_bias_here_and_as_scale_there():
    layer = Layer().requires_grad_(False)
    for bias, scale in ((layer.bias, None), (None, layer.bias)):
        got, wanted = (
            grouped_linear(X, layer.weight, bias, ROUTING, scale=scale, backend=backend)
            for backend in ("cpu", "reference")
        )
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@needs_onednn
def test_a_compiled_function_sees_changed_weights():
    torch._dynamo.reset()
    layer = Layer()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        compiled(X)
        layer.weight.mul_(2)
        torch.testing.assert_close(compiled(X), layer(X, "reference"), rtol=1e-4, atol=1e-4)
        layer.weight.data.mul_(2)
        torch.testing.assert_close(compiled(X), layer(X, "reference"), rtol=1e-4, atol=1e-4)
