"""Grouped leaves and ExpertBlock on packed rows, against each image through its expert's plain block."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from _packed import bounds
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from mixpert_kernels import Routing
from mixpert_kernels.modules import PreNormPlan, expertize
from mixpert_kernels.modules.binding import bind
from mixpert_kernels.modules.grouped import by_row
from mixpert_kernels.testing import assert_as_accurate, randomize_

D, E, MERGED = 6, 4, 4
LENGTHS, EXPERT = (4, 0, 12, 8), (2, 1, 0, 2)


class ToyRMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.variance_epsilon)


class Merger(nn.Module):
    """As Qwen-VL's: a norm and a loose parameter on the rows, two layers on each four of them as one."""

    def __init__(self, norm: type[nn.Module] = ToyRMSNorm) -> None:
        super().__init__()
        self.norm, self.gamma = norm(D), nn.Parameter(torch.ones(D))
        self.first, self.second = nn.Linear(MERGED * D, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        rows = (self.gamma * self.norm(x)).view(*x.shape[:-2], -1, MERGED * D)
        return self.second(F.gelu(self.first(rows)))


class Heads(nn.Module):
    """A norm of each head's query."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.norm = nn.Linear(D, D), ToyRMSNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.query(x).view(*x.shape[:-1], 2, 3)).flatten(-2)


class HeadsLayerNorm(Heads):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(3)


BLOCKS = {
    "merger": Merger,
    "merger with LayerNorm": lambda: Merger(nn.LayerNorm),
    "heads": Heads,
    "heads with LayerNorm": HeadsLayerNorm,
    "projector": lambda: nn.Sequential(nn.Linear(D, 9), nn.GELU(), nn.Linear(9, 5)),
}


def experts_of(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    return randomize_(expertize(BLOCKS[name](), E)).to(dtype)


def rows(lengths=LENGTHS, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(sum(lengths), D, generator=generator, dtype=torch.float64).to(dtype)


def route(lengths=LENGTHS, expert=EXPERT) -> Routing:
    return Routing.forced(torch.tensor(expert), E, cu_seqlens=bounds(lengths))


def by_loop(experts: nn.Module, dy: Tensor, x: Tensor) -> dict[str, Tensor]:
    """y and, of experts 0 and 2, all gradients, an image at a time."""
    alone = {e: experts.select(e).to(x.dtype) for e in range(E)}
    parts = zip(EXPERT, x.split(LENGTHS), strict=True)
    y = torch.cat([alone[e](part) for e, part in parts])
    y.backward(dy.to(y.dtype))
    found = {f"{n} of {e}": p.grad for e in (0, 2) for n, p in alone[e].named_parameters()}
    return {"y": y.detach(), **found}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_each_image_goes_through_its_experts_block(name, dtype):
    experts, x = experts_of(name, dtype), rows(dtype=dtype)
    y = experts(x, route())
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape)
    y.backward(dy.to(dtype))
    got = {"y": y.detach()}
    for path, parameter in experts.block.named_parameters():
        plain = path.replace("parametrizations.", "").replace(".original", "")
        assert parameter.grad[1].eq(0).all() and parameter.grad[3].eq(0).all(), path  # no row
        got |= {f"{plain} of {e}": parameter.grad[e] for e in (0, 2)}
    loop, truth = by_loop(experts, dy, x), by_loop(experts, dy, x.double())
    assert got.keys() == loop.keys()
    for key, tensor in got.items():
        assert_as_accurate(key, tensor, loop[key], truth[key])


@pytest.mark.parametrize("name", BLOCKS)
def test_images_of_one_size_are_what_they_are_unpacked(name):
    experts, x, expert = experts_of(name, torch.float32), rows((8, 8, 8), torch.float32), (2, 0, 2)
    wanted = experts(x.view(3, 8, D), Routing.forced(torch.tensor(expert), E))
    assert torch.equal(experts(x, route((8, 8, 8), expert)), wanted.view(-1, wanted.shape[-1]))


def test_rows_may_stand_behind_a_dimension_of_one():
    """As Pixtral's (1, R, D)."""
    experts, x = experts_of("heads"), rows()
    before = bind(route(), len(x))
    try:
        y = experts.block(x[None])
    finally:
        bind(*before)
    assert torch.equal(y[0], experts(x, route()))


def test_the_gradient_of_a_vector_is_summed_in_float32():
    table = torch.ones(E, D, dtype=torch.bfloat16, requires_grad=True)
    by_row(table, route((3000, 0, 10, 5)), 3015).sum().backward()
    assert table.grad[:, 0].tolist() == [10, 0, torch.tensor(3005.0).bfloat16(), 0]


def test_compiles_as_one_graph_for_any_rows_and_tiles():
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    experts = experts_of("merger", torch.float32)

    def function(x, expert, order, offsets, cu_seqlens):
        return experts(x, Routing(expert, order, offsets, None, cu_seqlens)).sin()

    compiled = torch.compile(function, backend=graphs, fullgraph=True)
    for lengths in (LENGTHS, (8, 4, 4), (4, 4, 4, 8, 8, 40), (20, 16)):
        expert = tuple(b % 3 for b in range(len(lengths)))
        given = (rows(lengths, torch.float32), *route(lengths, expert).ids)
        y, wanted = compiled(*given), function(*given)
        torch.testing.assert_close(y, wanted)
        y.sum().backward()
    assert graphs.frame_count <= 2, "once for fixed sizes, once for all others"


def test_a_plan_whose_attention_is_of_tiles_steps_aside(monkeypatch):
    experts, x = experts_of("heads"), rows()
    wanted = experts(x, route())
    monkeypatch.setattr(PreNormPlan, "serves", lambda *_: True)
    monkeypatch.setattr(experts, "plan", PreNormPlan(*"abcdefghij"))
    assert torch.equal(experts(x, route()), wanted)


def test_resized_boundaries():
    routing = route()
    assert routing.resized(6, 24).cu_seqlens.tolist() == [0, 1, 1, 4, 6]
    assert routing.resized(48, 24).cu_seqlens.tolist() == [0, 8, 8, 32, 48]
    assert routing.resized(24, 24) is routing
    assert routing.resized(6, 24).cu_seqlens.dtype == torch.int32
    unpacked = Routing.forced(torch.tensor(EXPERT), E)
    assert unpacked.resized(6, 24) is unpacked
    with pytest.raises(ValueError) as error:
        routing.resized(7, 24)
    assert str(error.value) == "Routing.resized: rows must divide 24 or be a multiple, got 7"
    with pytest.raises(ValueError) as error:
        route((4, 2, 6, 12)).resized(6, 24)
    assert str(error.value) == "Routing.resized: every tile must begin at a multiple of 4, got 6"


def test_bad_calls_are_named():
    experts, x = experts_of("merger"), rows()
    cases = {
        "x must have shape (R, D), got (1, 24, 6)": (x[None], route()),
        "x must have shape (B, T, D), got (24, 6)": (x, Routing.forced(torch.tensor(EXPERT), E)),
        "routing must be of 4 tiles over 4 experts, got 3 over 4": (
            x,
            Routing.forced(torch.tensor([0, 1, 2]), E, cu_seqlens=bounds(LENGTHS)),
        ),
    }
    for message, arguments in cases.items():
        with pytest.raises(ValueError) as error:
            experts(*arguments)
        assert str(error.value) == f"ExpertBlock: {message}"
    before = bind(route())
    try:
        with pytest.raises(RuntimeError, match="packed rows need bind to be told how many"):
            experts.block.norm(x)
    finally:
        bind(*before)
