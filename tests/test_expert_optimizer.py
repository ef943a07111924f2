"""ExpertOptimizer: experts of one mixed run are bit for bit the experts of separate runs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from _towers import EXPERTS, KINDS, grouped, pixels, reference_only
from _training import (
    CLIP,
    MAKE,
    ROUTES,
    batches,
    equal,
    loss_of,
    same,
    schedule,
    staged,
    state_of,
    train_mixed,
)
from torch import Tensor, nn

from mixpert_kernels import FusedMixpertTower
from mixpert_kernels.training import ExpertOptimizer

pytestmark = pytest.mark.usefixtures("one_thread")


def train_alone(
    tower: FusedMixpertTower, optimizer: torch.optim.Optimizer, data: list, expert: int, *,
    route: int, after: Callable[[], None], before: Callable[[], None] = lambda: None, parts: int = 1,
) -> None:  # fmt: skip
    """The steps that have images of ``expert``, on those alone, routed to ``route``."""
    for images, routes, goal in data:
        found = False
        for piece in torch.arange(len(routes)).tensor_split(parts):
            own = piece[routes[piece] == expert]
            if len(own):
                found = True
                where = torch.full((len(own),), route)
                loss_of(tower, images[own], where, goal[own]).backward()
        if found:
            before()
            optimizer.step()
            after()
            optimizer.zero_grad()


OPTIONS = {
    "plain": {},
    "clipped": {"max_norm": CLIP},
    "scheduled": {"schedule": schedule},
    "all": {"max_norm": CLIP, "schedule": schedule},
}
ways = pytest.mark.parametrize(
    "name, options, parts",
    [
        *[(name, "all", 1) for name in MAKE],
        ("adamw", "plain", 1),
        ("momentum", "clipped", 1),
        ("adamw", "scheduled", 1),
        ("adamw", "all", 2),
        ("nesterov", "all", 2),
    ],
)


@ways
def test_a_mixed_run_is_the_separate_runs(name, options, parts, monkeypatch) -> None:
    """Bitwise, on the reference path, against runs of the same tower that see one expert's images only.

    The loss is computed sample by sample: a matrix product over the mixed batch may round by the batch's size.
    """
    reference_only(monkeypatch)
    tower, data = staged(), batches()
    towers = [copy.deepcopy(tower) for _ in range(EXPERTS)]
    start = [state_of(tower, e) for e in range(EXPERTS)]
    optimizer = ExpertOptimizer(tower, MAKE[name], **OPTIONS[options])
    train_mixed(tower, optimizer, data, parts)
    assert optimizer.steps == [sum(e in routes for routes in ROUTES) for e in range(EXPERTS)]
    for e, alone in enumerate(towers):
        own = ExpertOptimizer(alone, MAKE[name], **OPTIONS[options])
        train_alone(alone, own, data, e, route=e, after=lambda: None, parts=parts)
        assert same(state_of(tower, e), state_of(alone, e)), e
        assert not same(state_of(tower, e), start[e])
        assert own.steps == [optimizer.steps[e] if i == e else 0 for i in range(EXPERTS)]
        for other in set(range(EXPERTS)) - {e}:
            assert same(state_of(alone, other), start[other])  # weight decay and momentum included


@ways
@pytest.mark.parametrize("kind", ["siglip", "dinov2"])
def test_an_expert_is_what_a_stock_optimizer_makes_of_it_alone(
    name, options, parts, kind, monkeypatch
) -> None:
    """Bitwise, on the reference path, against torch's own optimizer, clipping and schedule over a one-expert tower."""
    reference_only(monkeypatch)
    tower = staged(kind)
    data = batches(size=KINDS[kind].size)
    singles = []
    for e in range(EXPERTS):
        vision, projector = tower.export_expert(e)
        single = FusedMixpertTower.from_vision_model(vision, projector, num_experts=1).train()
        single.trunk.requires_grad_(False)
        singles.append(single)
    train_mixed(tower, ExpertOptimizer(tower, MAKE[name], **OPTIONS[options]), data, parts)
    for e, single in enumerate(singles):
        parameters = list(grouped(single).values())
        stock = MAKE[name](parameters)
        rates = torch.optim.lr_scheduler.LambdaLR(
            stock, OPTIONS[options].get("schedule", lambda _: 1.0)
        )
        limit = OPTIONS[options].get("max_norm")
        clip = (
            functools.partial(nn.utils.clip_grad_norm_, parameters, limit)
            if limit
            else lambda: None
        )
        train_alone(single, stock, data, e, route=0, before=clip, after=rates.step, parts=parts)
        assert same(state_of(tower, e), state_of(single, 0)), e


def test_trunk_features_do_not_depend_on_the_batch(monkeypatch) -> None:
    """What the tests above stand on: embedding and trunk give a tile the same bits in any batch."""
    reference_only(monkeypatch)
    for kind in ("siglip", "dinov2"):
        tower, images = staged(kind), pixels(5, KINDS[kind].size, 50)
        whole = tower.trunk_features(images)
        for chosen in ([0], [3, 1], [4, 2, 0]):
            assert torch.equal(tower.trunk_features(images[chosen]), whole[chosen])
        assert not whole.requires_grad


@pytest.mark.parametrize("name", MAKE)
def test_experts_without_images_keep_weights_and_state(name: str) -> None:
    tower = staged()
    optimizer = ExpertOptimizer(tower, MAKE[name], max_norm=CLIP)
    train_mixed(tower, optimizer, batches(([0, 1, 2], [2, 1, 0])))  # momentum for all
    before = [state_of(tower, e) for e in range(EXPERTS)], copy.deepcopy(optimizer.state_dict())
    train_mixed(tower, optimizer, batches(([1, 1],)))
    after = [state_of(tower, e) for e in range(EXPERTS)], optimizer.state_dict()
    for e in range(EXPERTS):
        assert same(after[0][e], before[0][e]) == (e != 1)
        assert equal(after[1]["experts"][e], before[1]["experts"][e]) == (e != 1)
    assert optimizer.steps == [2, 3, 2]


def test_shared_parameters_train_beside() -> None:
    """Whatever else is trainable goes by one more optimizer, as a stock one would move it."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"tower": staged(), "head": nn.Linear(12, 4)})
    model.head.requires_grad_(True)
    stock_head = copy.deepcopy(model.head)
    optimizer = ExpertOptimizer(model, MAKE["adamw"], max_norm=CLIP, schedule=schedule)
    stock = MAKE["adamw"](stock_head.parameters())
    rates = torch.optim.lr_scheduler.LambdaLR(stock, schedule)
    for images, expert, _ in batches():
        y = model.tower(images, expert=expert).last_hidden_state.mean(1)
        model.head(y).square().mean().backward()
        stock_head(y.detach()).square().mean().backward()
        norm = nn.utils.clip_grad_norm_(stock_head.parameters(), CLIP)
        stock.step()
        rates.step()
        stock.zero_grad()
        optimizer.step()
        assert optimizer.last_norms["shared"] == float(norm)
        optimizer.zero_grad()
        for got, want in zip(model.head.parameters(), stock_head.parameters(), strict=True):
            assert torch.equal(got, want)
    assert len(optimizer.param_groups) == 2


def test_make_may_use_several_groups(monkeypatch) -> None:
    """No decay on vectors, as is usual; bitwise what a stock optimizer with those groups does."""
    reference_only(monkeypatch)

    def make_groups(tensors: list[Tensor], skip: int = 0) -> torch.optim.Optimizer:
        matrices = [t for t in tensors if t.ndim - skip >= 2]
        vectors = [t for t in tensors if t.ndim - skip < 2]
        groups = [{"params": vectors, "weight_decay": 0.0}, {"params": matrices, "lr": 1e-3}]
        return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.3)

    tower, data = staged(), batches()
    vision, projector = tower.export_expert(2)
    single = FusedMixpertTower.from_vision_model(vision, projector, num_experts=1).train()
    single.trunk.requires_grad_(False)
    optimizer = ExpertOptimizer(tower, make_groups)
    train_mixed(tower, optimizer, data[:4])
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    train_mixed(tower, optimizer, data[4:])
    stock = make_groups(list(grouped(single).values()), skip=1)
    train_alone(single, stock, data, 2, route=0, after=lambda: None)
    assert same(state_of(tower, 2), state_of(single, 0))
