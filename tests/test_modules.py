"""Grouped leaves, and expertize on hand-made blocks."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mixpert_kernels import Routing
from mixpert_kernels.modules import (
    GroupedLayerNorm,
    GroupedLinear,
    GroupedRMSNorm,
    Router,
    expertize,
)
from mixpert_kernels.modules.binding import bind
from mixpert_kernels.testing import randomize_

D = 6


class ToyBlock(nn.Module):
    """Every kind of leaf: linear with and without bias, LayerNorm, RMSNorm, loose vectors."""

    def __init__(self, width=D):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-3), nn.RMSNorm(width, eps=1e-3)
        self.mixer = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 9), nn.Tanh(), nn.Linear(9, width))
        self.scale1 = nn.Parameter(torch.full((width,), 0.1))
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, x, times=1.0):
        mixed = self.mixer(self.norm1(x)).mean(1, keepdim=True).tanh() * times  # tokens meet
        x = x + self.scale1 * mixed + self.shift
        return x + self.mlp(self.norm2(x))


class ScaledRMSNorm(nn.Module):
    """Gemma's kind, under a name that says nothing."""

    def __init__(self, width):
        super().__init__()
        self.eps, self.weight = 1e-6, nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * (1 + self.weight)


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def route(ids, experts=3):
    return Routing.forced(torch.tensor(ids), experts)


def experts_of(block, experts=3):
    """Different experts, float64."""
    return randomize_(expertize(block, experts).double(), seed=1)


def by_loop(experts, x, ids, **kwargs):
    """Each tile alone through the plain block of its expert."""
    plain = [experts.select(e) for e in range(experts.num_experts)]
    return torch.cat([plain[e](x[b : b + 1], **kwargs) for b, e in enumerate(ids)])


@pytest.mark.parametrize("ids", [[2, 0, 2, 1], [1, 1, 1, 1], [0]])
def test_every_leaf_serves_each_tile_by_its_expert(ids):
    experts, x = experts_of(ToyBlock()), rand(len(ids), 3, D)
    torch.testing.assert_close(
        experts(x, route(ids), times=2.0), by_loop(experts, x, ids, times=2.0)
    )


def test_untrained_clones_are_the_block_and_the_block_is_not_changed():
    block = randomize_(ToyBlock().double())
    before, x = copy.deepcopy(block.state_dict()), rand(4, 3, D)
    experts = expertize(block, 3)
    torch.testing.assert_close(experts(x, route([2, 0, 1, 1])), block(x), rtol=1e-12, atol=1e-12)
    randomize_(experts)
    assert before.keys() == block.state_dict().keys()
    assert all(torch.equal(block.state_dict()[name], value) for name, value in before.items())


def test_perturbing_an_expert_moves_its_own_tiles_and_no_other_by_a_bit():
    experts, x = experts_of(ToyBlock()), rand(4, 3, D)
    routing = route([2, 0, 2, 1])
    before = experts(x, routing)
    names = [name for name, _ in experts.named_parameters()]
    assert len(names) == 10
    for name, parameter in experts.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter[2] += 0.5
        moved = (experts(x, routing) - before).abs().amax((1, 2)) / before.abs().max()
        assert (moved[[0, 2]] > 1e-3).all(), name
        assert moved[[1, 3]].eq(0).all(), name
        with torch.no_grad():
            parameter.copy_(kept)


def test_gradients_equal_those_of_each_expert_alone():
    experts, x, ids = experts_of(ToyBlock(), 4), rand(4, 3, D), [2, 0, 2, 1]
    dy = rand(4, 3, D, seed=3)
    experts(x, route(ids, 4)).backward(dy)
    got = {n: p.grad for n, p in experts.named_parameters()}
    for e in range(4):
        plain, mask = experts.select(e), torch.tensor(ids) == e
        if mask.any():
            plain(x[mask]).backward(dy[mask])
        for name, gradient in got.items():
            short = name.removeprefix("block.").replace("parametrizations.", "")
            parameter = plain.get_parameter(short.removesuffix(".original"))
            wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(gradient[e], wanted)
            assert e != 3 or gradient[e].eq(0).all()


def test_a_frozen_parameter_stays_frozen_and_training_mode_is_kept():
    block = ToyBlock().eval()
    block.mixer.weight.requires_grad_(False)
    block.shift.requires_grad_(False)
    experts = expertize(block, 2)
    frozen = {n for n, p in experts.named_parameters() if not p.requires_grad}
    assert frozen == {"block.mixer.weight", "block.parametrizations.shift.original"}
    modules = dict(experts.block.named_modules())
    assert not any(m.training for name, m in modules.items() if "parametrizations" not in name)


def test_select_returns_the_plain_block_with_parameters_of_its_own():
    block = ToyBlock().double()
    experts = experts_of(block)
    plain = experts.select(1)
    assert type(plain) is ToyBlock
    assert plain.state_dict().keys() == block.state_dict().keys()
    before = experts(rand(1, 3, D), route([1]))
    randomize_(plain, seed=9)
    assert torch.equal(experts(rand(1, 3, D), route([1])), before)


def test_survives_deepcopy_pickle_and_a_state_dict_round_trip():
    experts, x, routing = experts_of(ToyBlock()), rand(2, 3, D), route([2, 1])
    wanted = experts(x, routing)
    fresh = expertize(ToyBlock().double(), 3)
    fresh.load_state_dict(experts.state_dict())
    for other in (copy.deepcopy(experts), fresh):
        assert torch.equal(other(x, routing), wanted)
        assert other.select(2).state_dict().keys() == ToyBlock().state_dict().keys()
    leaf = expertize(nn.Linear(2, 2), 2)
    again = pickle.loads(pickle.dumps(leaf))
    assert torch.equal(
        again(torch.ones(1, 1, 2), route([1], 2)), leaf(torch.ones(1, 1, 2), route([1], 2))
    )


def test_a_class_that_only_shares_a_name_runs_its_own_forward():
    class LayerNorm(nn.Module):  # no normalisation at all
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(D))

        def forward(self, x):
            return x.square() * self.weight

    experts, x = experts_of(LayerNorm()), rand(2, 3, D)
    torch.testing.assert_close(
        experts(x, route([2, 1])),
        x.square() * experts.block.parametrizations.weight.original[[2, 1]][:, None],
    )


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class NoEpsRMSNorm(ScaledRMSNorm):
    def __init__(self, width):
        super().__init__(width)
        del self.eps


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(3, D))


@pytest.mark.parametrize(
    "leaf, message",
    [
        (nn.Conv1d(3, 3, 1), "cannot clone Conv1d at 1.0: no grouped leaf for it"),
        (nn.Embedding(3, 3), "cannot clone Embedding at 1.0: no grouped leaf for it"),
        (nn.BatchNorm1d(3), "cannot clone BatchNorm1d at 1.0: no grouped leaf for it"),
        (
            nn.MultiheadAttention(4, 2),
            "cannot clone MultiheadAttention at 1.0: no grouped leaf for it",
        ),
        (
            nn.LayerNorm((3, D)),
            "cannot clone LayerNorm at 1.0: it normalises over several dimensions or has no gain",
        ),
        (
            nn.RMSNorm((3, D)),
            "cannot clone RMSNorm at 1.0: it normalises over several dimensions or has no gain",
        ),
        (
            nn.RMSNorm(D, elementwise_affine=False),
            "cannot clone RMSNorm at 1.0: it normalises over several dimensions or has no gain",
        ),
        (
            ScaledRMSNorm(D),
            "cannot clone ScaledRMSNorm at 1.0: it computes something else than x / rms(x) * weight",
        ),
        (NoEpsRMSNorm(D), "cannot clone NoEpsRMSNorm at 1.0: it has no eps"),
        (
            Doubled(2, 3),
            "cannot clone parameter weight of Doubled at 1.0: it has shape (3, 2), and only vectors and the rows of "
            "LOOSE_MATRICES are known",
        ),
        (
            Table(),
            "cannot clone parameter positions of Table at 1.0: it has shape (3, 6), and only vectors and the rows of "
            "LOOSE_MATRICES are known",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_leaf_that_cannot_be_cloned_is_named(leaf, message):
    with pytest.raises(ValueError) as error:
        expertize(nn.Sequential(nn.Linear(2, 2), nn.Sequential(leaf)), 2)
    assert str(error.value) == f"expertize: {message}"


def test_bad_calls_are_named():
    with pytest.raises(ValueError, match="expertize: num_experts must be at least 1, got 0"):
        expertize(nn.Linear(2, 2), 0)
    experts = expertize(ToyBlock(), 2)
    x, routing = torch.zeros(2, 3, D), route([1, 0], 2)
    cases = {
        "x must have shape (B, T, D), got (2, 6)": (x[:, 0], routing),
        "x must have shape (B, T, D), got (2, 1, 3, 6)": (x[:, None], routing),
        "routing must be a Routing, got NoneType": (x, None),
        "routing must be of 2 tiles over 2 experts, got 3 over 2": (x, route([0, 0, 1], 2)),
        "routing must be of 2 tiles over 2 experts, got 2 over 3": (x, route([0, 1], 3)),
    }
    for message, arguments in cases.items():
        with pytest.raises(ValueError) as error:
            experts(*arguments)
        assert str(error.value) == f"ExpertBlock: {message}"


def bound(leaf, x, ids):
    before = bind(route(ids))
    try:
        return leaf(x)
    finally:
        bind(*before)


@pytest.mark.parametrize("shape", [(2, D), (2, 3, D), (2, 3, 2, D)])
@pytest.mark.parametrize(
    "plain",
    [
        nn.Linear(D, 4),
        nn.Linear(D, 4, bias=False),
        nn.LayerNorm(D),
        nn.LayerNorm(D, bias=False),
        nn.RMSNorm(D),
    ],
    ids=str,
)
def test_a_grouped_leaf_takes_any_number_of_middle_dimensions(plain, shape):
    """Heads in a query norm are one."""
    experts, x = experts_of(plain), rand(*shape)
    got = bound(experts.block, x, [2, 1])
    wanted = torch.stack([experts.select(e)(x[b]) for b, e in enumerate([2, 1])])
    torch.testing.assert_close(got, wanted)


def test_rms_norms_that_scale_by_1_plus_w_are_known_by_name():
    from_table = type("Gemma3RMSNorm", (ScaledRMSNorm,), {})(D)
    experts, x = experts_of(from_table), rand(2, 3, D)
    assert isinstance(experts.block, GroupedRMSNorm)
    got = experts(x, route([2, 1]))
    torch.testing.assert_close(got, by_loop(experts, x, [2, 1]))


def test_a_loose_matrix_of_the_table_multiplies_each_tile_by_its_own():
    class Gemma3MultiModalProjector(nn.Module):
        def __init__(self):
            super().__init__()
            self.mm_input_projection_weight = nn.Parameter(torch.zeros(D, 4))

        def forward(self, x):
            return torch.matmul(x, self.mm_input_projection_weight)

    experts, x = experts_of(Gemma3MultiModalProjector()), rand(3, 5, D)
    torch.testing.assert_close(experts(x, route([2, 0, 2])), by_loop(experts, x, [2, 0, 2]))


def test_fresh_leaves_are_initialised():
    leaf = GroupedLinear(16, 4, 3)
    assert leaf.weight.isfinite().all() and leaf.bias.isfinite().all()
    assert 0 < leaf.weight.abs().max() <= 0.25
    assert not torch.equal(leaf.weight[0], leaf.weight[1])
    norm = GroupedLayerNorm.clone(nn.LayerNorm(4), 3)
    rms = GroupedRMSNorm(nn.Parameter(torch.empty(3, 4)), 1e-6, offset=1.0)
    for module in (norm, rms):
        randomize_(module)
        module.reset_parameters()
    assert norm.weight.eq(1).all() and norm.bias.eq(0).all() and rms.weight.eq(0).all()


@pytest.mark.parametrize("hidden", [None, 5])
def test_the_router_is_layer_norm_then_linear_layers(hidden):
    router, z = randomize_(Router(D, 3, hidden)).double(), rand(4, D)
    h = F.layer_norm(z, (D,), router.norm.weight, router.norm.bias, 1e-5)
    if hidden:
        h = F.gelu(router.hidden(h))
    torch.testing.assert_close(router(z), router.out(h))


def test_a_block_that_calls_leaves_with_tokens_first_is_refused():
    class MLCDAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(4, 4)

    with pytest.raises(ValueError, match="MLCDAttention at attn: it calls its leaves with tokens"):
        expertize(nn.ModuleDict({"attn": MLCDAttention()}), 2)
