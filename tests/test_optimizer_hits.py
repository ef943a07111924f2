"""ExpertOptimizer in use: hits, moved models, saved states, bad arguments."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from _towers import EXPERTS, KINDS, grouped, make, pixels, refused
from _training import (
    CLIP,
    MAKE,
    SIZE,
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
from mixpert_kernels.training import ExpertOptimizer, set_stage

pytestmark = pytest.mark.usefixtures("one_thread")

# Hits


def test_hits_are_of_backward() -> None:
    tower = staged()
    optimizer = ExpertOptimizer(tower, MAKE["adamw"])
    images = pixels(2, SIZE)

    def features(*expert: int) -> Tensor:
        return tower(images, expert=torch.tensor(expert)).last_hidden_state

    def stepped() -> list[int]:
        before = optimizer.steps
        optimizer.step()
        optimizer.zero_grad()
        return [after - old for after, old in zip(optimizer.steps, before, strict=True)]

    features(0, 1)  # no backward
    features(2, 2).sum().backward()
    assert stepped() == [0, 0, 1]
    y = features(0, 1).sum()
    optimizer.zero_grad()  # between forward and backward, as many do
    y.backward()
    assert stepped() == [1, 1, 0]
    features(0, 0).sum().backward()
    optimizer.zero_grad()  # a batch given up
    features(1, 1).sum().backward()
    assert stepped() == [0, 1, 0]
    features(0, 0).sum().backward()
    assert stepped() == [1, 0, 0]
    features(1, 1).sum().backward()  # no zero_grad in between: step counts as well
    optimizer.step()
    features(2, 2).sum().backward()
    assert stepped() == [0, 0, 1]
    with torch.no_grad():
        features(0, 1)
    assert stepped() == [0, 0, 0]
    with optimizer.no_hits():
        y = features(0, 1).sum()
    y.backward()
    assert stepped() == [0, 0, 0]
    with optimizer.no_hits():
        y = features(0, 1).sum()
    optimizer.hit(1)
    y.backward()
    assert stepped() == [0, 1, 0]


@pytest.mark.parametrize("options", [{"projector": None}, {"projector": "mlp"}])
def test_hits_of_the_expert_segment_alone(options: dict) -> None:
    """Trunk features that were cached, and tiles of AnyRes images, hit as images do."""
    if options["projector"] is None:
        tower = FusedMixpertTower.from_vision_model(KINDS["siglip"].build(), num_experts=EXPERTS)
    else:
        tower = make("siglip")
    set_stage(tower, "experts")
    optimizer = ExpertOptimizer(tower, MAKE["adamw"])
    x = tower.trunk_features(pixels(3, SIZE))
    routing = tower.route(x, expert=torch.tensor([1, 1, 1]))
    tower.expert_segment(x, routing).sum().backward()
    optimizer.step()
    assert optimizer.steps == [0, 1, 0]
    tiles = torch.tensor([0, 0, 1])
    y = tower(pixels(3, SIZE), image_of_tile=tiles, expert=torch.tensor([2, 0])).last_hidden_state
    y.sum().backward()
    optimizer.step()
    assert optimizer.steps == [1, 1, 1]


@pytest.mark.parametrize("reentrant", [False, True])
def test_hits_under_gradient_checkpointing(reentrant: bool) -> None:
    tower = staged()
    tower.gradient_checkpointing_enable({"use_reentrant": reentrant})
    optimizer = ExpertOptimizer(tower, MAKE["adamw"])
    x = tower.trunk_features(pixels(2, SIZE)).requires_grad_(True)  # the reentrant kind asks for it
    y = tower.expert_segment(x, tower.route(x.detach(), expert=torch.tensor([2, 0])))
    optimizer.zero_grad()
    y.sum().backward()
    optimizer.step()
    assert optimizer.steps == [1, 0, 1]


def test_a_copy_of_a_model_hits_nothing_of_the_original() -> None:
    tower = staged()
    optimizer = ExpertOptimizer(tower, MAKE["adamw"])
    for twin in (copy.deepcopy(tower), pickle.loads(pickle.dumps(tower.projector))):
        for p in twin.parameters():
            p.grad = torch.ones_like(p)
        if twin.__class__ is type(tower):
            twin(pixels(1, SIZE), expert=torch.tensor([1])).last_hidden_state.sum().backward()
    optimizer.step()
    assert optimizer.steps == [0, 0, 0]


def test_an_optimizer_that_is_gone_leaves_no_hook() -> None:
    tower = staged()
    optimizer = ExpertOptimizer(tower, MAKE["adamw"])
    assert len(tower.projector._forward_hooks) == 1
    del optimizer
    assert len(tower.projector._forward_hooks) == 0


def test_a_compiled_tower_hits() -> None:
    """Under torch.compile the hook runs in the graph: hits are of forward, and zero_grad must come before it."""
    torch._dynamo.reset()
    tower, plain = staged(), staged()
    optimizer = ExpertOptimizer(tower, MAKE["momentum"])
    other = ExpertOptimizer(plain, MAKE["momentum"])

    @functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    def features(images: Tensor, expert: Tensor) -> Tensor:
        return (
            tower(images, expert=expert).last_hidden_state * 1.0
        )  # inside the graph, not at its end

    for images, expert, goal in batches(([1, 1], [0, 2], [1, 2])):
        (features(images, expert) - goal).square().mean().backward()
        (plain(images, expert=expert).last_hidden_state - goal).square().mean().backward()
        for one in (optimizer, other):
            one.step()
            one.zero_grad()
    assert optimizer.steps == other.steps == [1, 2, 2]
    images, expert, _ = batches(([0, 1],))[0]
    with optimizer.no_hits():
        y = features(images, expert)
    y.sum().backward()
    optimizer.step()
    assert optimizer.steps == [1, 2, 2]
    torch._dynamo.reset()


def test_gradients_that_nobody_hit_raise() -> None:
    """As of a model that ran compiled before it had the hook: silence would train nothing."""
    tower = staged()
    optimizer = ExpertOptimizer(tower, MAKE["momentum"])
    optimizer.step()  # neither gradients nor hits
    optimizer.hit(1)
    optimizer.step()  # hit, and no gradients
    assert optimizer.steps == [0, 0, 0]
    for p in grouped(tower).values():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    assert "ExpertOptimizer.step: some expert must have been hit" in str(caught.value)
    optimizer.hit(torch.tensor([0, 2, 2]))
    optimizer.step()
    assert optimizer.steps == [1, 0, 1]
    with optimizer.no_hits():
        tower(pixels(1, SIZE), expert=torch.tensor([1]))
    optimizer.step()
    assert optimizer.steps == [1, 0, 1]
    with pytest.raises(RuntimeError):  # the next batch is another
        optimizer.step()


def test_a_gradient_scaler_works_on_it() -> None:
    """Scaled gradients step as plain ones do, to the bit (a power of 2); a batch that overflows leaves no hit."""
    tower, plain = staged(), staged()
    optimizer, other = (ExpertOptimizer(t, MAKE["adamw"], max_norm=CLIP) for t in (tower, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for overflows, (images, expert, goal) in zip(
        (False, True, False), batches(([0, 1], [1, 2], [0, 0])), strict=True
    ):
        scaler.scale(loss_of(tower, images, expert, goal)).backward()
        if overflows:
            tower.projector.block[2].bias.grad[1, 0] = float("inf")
        else:
            loss_of(plain, images, expert, goal).backward()
            other.step()
            other.zero_grad()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert optimizer.steps == other.steps == [2, 1, 0]
    assert all(same(state_of(tower, e), state_of(plain, e)) for e in range(EXPERTS))


# Moving, saving, refusing


@pytest.mark.parametrize("how", ["dtype", "swap"])
def test_the_model_may_move_after_the_optimizer_was_made(how: str) -> None:
    tower = staged()
    optimizer = ExpertOptimizer(tower, MAKE["adamw"])
    if how == "dtype":  # before there is a state, as with torch's own
        tower.double()
        images, goal = pixels(2, SIZE).double(), torch.zeros(2, 1, 12).double()
    else:
        train_mixed(tower, optimizer, batches(([0, 1, 2],)))
        for p in grouped(tower).values():
            p.data = p.data.clone()
        images, goal = pixels(2, SIZE), torch.zeros(2, 1, 12)
    before = [state_of(tower, e) for e in range(EXPERTS)]
    loss_of(tower, images, torch.tensor([1, 1]), goal).backward()
    optimizer.step()
    assert [same(state_of(tower, e), before[e]) for e in range(EXPERTS)] == [True, False, True]


@pytest.mark.parametrize("name", ["adamw", "momentum"])
def test_a_run_goes_on_bitwise_from_its_state(name: str, tmp_path) -> None:
    data = batches()
    options = {"max_norm": CLIP, "schedule": schedule}
    tower = staged()
    optimizer = ExpertOptimizer(tower, MAKE[name], **options)
    train_mixed(tower, optimizer, data[:2])  # expert 1 has no state yet
    torch.save(
        {"tower": tower.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "s.pt"
    )
    train_mixed(tower, optimizer, data[2:])
    saved = torch.load(tmp_path / "s.pt", weights_only=True)
    again = staged(seed=9)
    again.load_state_dict(saved["tower"])
    resumed = ExpertOptimizer(again, MAKE[name], **options)
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.steps == [1, 0, 2]
    train_mixed(again, resumed, data[2:])
    assert resumed.steps == optimizer.steps
    assert equal(dict(again.state_dict()), dict(tower.state_dict()))
    assert equal(resumed.state_dict(), optimizer.state_dict())


def test_a_state_that_does_not_fit_is_refused() -> None:
    tower = staged()
    optimizer = ExpertOptimizer(tower, MAKE["adamw"])
    train_mixed(tower, optimizer, batches(([0, 1, 2],)))
    before = copy.deepcopy(optimizer.state_dict())
    load = "ExpertOptimizer.load_state_dict: state_dict"
    stock = MAKE["adamw"](grouped(make()).values()).state_dict()
    refused(
        lambda: optimizer.load_state_dict(stock),
        load,
        "must be an ExpertOptimizer's",
        "param_groups",
    )
    four = ExpertOptimizer(staged(num_experts=4), MAKE["adamw"]).state_dict()
    refused(lambda: optimizer.load_state_dict(four), load, "of 3 experts, got 4")
    deeper = ExpertOptimizer(staged(expert_layers=3), MAKE["adamw"]).state_dict()
    refused(
        lambda: optimizer.load_state_dict(deeper),
        load,
        "of the parameters that train",
        "experts.2.block",
    )
    wide = copy.deepcopy(before)
    wide["experts"][1]["shapes"][0] = [5]
    refused(lambda: optimizer.load_state_dict(wide), load, "of expert_1", "got [5]")
    headed = nn.ModuleDict({"tower": staged(), "head": nn.Linear(2, 2)})
    headed.head.requires_grad_(True)
    refused(
        lambda: optimizer.load_state_dict(ExpertOptimizer(headed, MAKE["adamw"]).state_dict()),
        load,
        "head.bias",
    )
    assert equal(optimizer.state_dict(), before)


def test_bad_arguments_are_refused() -> None:
    tower = staged()
    for wrong in (0.0, -1.0, float("nan")):
        refused(
            lambda w=wrong: ExpertOptimizer(tower, MAKE["adamw"], max_norm=w),
            "max_norm must be positive",
            str(wrong),
        )
    refused(
        lambda: ExpertOptimizer(nn.Linear(2, 2), MAKE["adamw"]), "exactly one FusedMixpertTower"
    )
    fewer = lambda tensors: MAKE["adamw"](tensors[1:])  # noqa: E731
    refused(
        lambda: ExpertOptimizer(tower, fewer),
        "make must return an optimizer of exactly the tensors",
    )
    tower.requires_grad_(False)
    refused(
        lambda: ExpertOptimizer(tower, MAKE["adamw"]), "must have trainable parameters, got none"
    )


def test_a_stock_scheduler_scales_every_expert() -> None:
    tower = staged()
    optimizer = ExpertOptimizer(tower, functools.partial(torch.optim.SGD, lr=0.5))
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step == 1 else 1.0)
    for moves in (True, False, True):
        before = [state_of(tower, e) for e in range(EXPERTS)]
        train_mixed(tower, optimizer, batches(([0, 1, 2],)))
        rates.step()
        assert all(same(state_of(tower, e), before[e]) != moves for e in range(EXPERTS))


def test_a_stock_scheduler_goes_on_from_a_state() -> None:
    """What it had made of the rate is part of the state, as in torch's own optimizers."""
    optimizer, again = (ExpertOptimizer(staged(), MAKE["momentum"]) for _ in range(2))
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    rates.step()
    again.load_state_dict(optimizer.state_dict())
    assert (
        [g["lr"] for g in again.param_groups] == [g["lr"] for g in optimizer.param_groups] == [5e-3]
    )


def test_norms_are_of_what_moved() -> None:
    tower = make("siglip", expert_names=["versatile", "chart", "photo"])
    set_stage(tower, "experts")
    optimizer = ExpertOptimizer(tower, MAKE["adamw"])
    assert optimizer.last_norms == {}
    images, expert, goal = batches(([2, 1, 1],))[0]
    loss_of(tower, images, expert, goal).backward()
    want = [
        torch.stack([p.grad[e].norm() for p in grouped(tower).values()]).norm() for e in range(3)
    ]
    optimizer.step()
    assert optimizer.last_norms.keys() == {"chart", "photo"}
    assert optimizer.last_norms["chart"] == pytest.approx(float(want[1]), rel=1e-5)
    assert optimizer.last_norms["photo"] == pytest.approx(float(want[2]), rel=1e-5)
