"""set_stage: what each stage trains, cloning, and the guard against stock optimizers."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from _towers import KINDS, WIDTH, grouped, make, pixels, reference_only, refused, run
from torch import Tensor, nn

from mixpert_kernels import FusedMixpertTower
from mixpert_kernels.modules import ExpertBlock, PreNormPlan
from mixpert_kernels.modules.grouped import GroupedLinear
from mixpert_kernels.training import (
    STAGES,
    ExpertOptimizer,
    find_tower,
    grouped_parameters,
    set_stage,
    stage_of,
)

SGD = functools.partial(torch.optim.SGD, lr=0.1, weight_decay=0.1)
# What each stage trains, by the first word of a parameter's name in the tower; "head" is around it.
TRAINS = {
    "alignment": {"projector"},
    "knowledge": {"trunk", "experts", "projector", "head"},
    "joint": {"trunk", "experts", "projector", "head"},
    "clone": set(),
    "experts": {"experts", "projector"},
    "router": {"router"},
}
MODELS = {
    "siglip": {},
    "dinov2": {},  # LayerScale: parametrized grouped parameters
    "dinov2_swiglu": {},  # leaf substitution
    "siglip_norm": {"final_norm": True},
    "dinov2_norm": {"final_norm": True},
    "siglip_bare": {"projector": None},
}
kinds = pytest.mark.parametrize("kind", ["siglip", "dinov2", "dinov2_swiglu"])


class Classifier(nn.Module):
    """A tower inside a model with parameters of its own."""

    def __init__(self, tower: FusedMixpertTower) -> None:
        super().__init__()
        self.vision = nn.ModuleDict({"tower": tower})
        self.head = nn.Linear(tower.config.hidden_size, 5)

    def forward(self, images: Tensor, expert: Tensor) -> Tensor:
        y = self.vision["tower"](images, expert=expert).last_hidden_state
        return self.head(y.mean(1))


def build(name: str, num_experts: int) -> FusedMixpertTower:
    options = dict(MODELS[name])
    kind = name.partition("_norm")[0].partition("_bare")[0]
    if "projector" in options:
        return FusedMixpertTower.from_vision_model(KINDS[kind].build(), num_experts=num_experts)
    return make(kind, num_experts=num_experts, **options)


def part_of(name: str) -> str:
    words = name.removeprefix("vision.tower.").split(".")
    return words[0]


def experts_of(stage: str) -> int:
    return 3 if stage in ("experts", "router", "clone") else 1


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_stage_trains_exactly_its_parameters(name: str, stage: str, wrapped: bool) -> None:
    tower = build(name, experts_of(stage))
    model = Classifier(tower) if wrapped else tower
    if stage == "alignment" and tower.projector is None:
        refused(
            lambda: set_stage(model, stage), "set_stage: model must have a projector", "got none"
        )
        return
    rows = set_stage(model, stage)
    names = dict(model.named_parameters())
    want = {n for n in names if part_of(n) in TRAINS[stage]}
    assert {n for n, p in names.items() if p.requires_grad} == want
    assert bool(want) == (stage != "clone")
    assert sum(row.trainable for row in rows) == sum(names[n].numel() for n in want)
    assert sum(row.frozen for row in rows) == sum(
        p.numel() for n, p in names.items() if n not in want
    )
    assert sum(row.bytes for row in rows) == sum(4 * p.numel() for p in names.values())
    assert stage_of(model) == stage_of(tower) == stage


def test_the_tricky_names_are_where_they_belong() -> None:
    tower = make("dinov2", final_norm=True)
    set_stage(tower, "experts")
    trains = {n for n, p in tower.named_parameters() if p.requires_grad}
    assert "experts.1.block.layer_scale2.parametrizations.lambda1.original" in trains
    assert "trunk.layernorm.weight" in dict(tower.named_parameters())
    assert not any(name.startswith("trunk") for name in trains)
    assert set(grouped_parameters(tower)) == trains == set(grouped(tower))
    model = Classifier(tower)
    assert set(grouped_parameters(model)) == {f"vision.tower.{name}" for name in trains}
    assert all(p.shape[0] == 3 for p in grouped_parameters(model).values())


def test_the_table(capsys: pytest.CaptureFixture) -> None:
    tower = make("siglip")
    rows = set_stage(Classifier(tower), "experts")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["stage", "experts", "trainable", "frozen", "bytes"]
    assert [line.split() for line in lines[1:]] == [[str(v) for v in row] for row in rows]
    assert [row.part for row in rows] == ["trunk", "experts", "projector", "router", "model"]
    assert len({len(line) for line in lines}) == 1
    projector = 3 * (WIDTH * 20 + 20 + 20 * 12 + 12)
    assert tuple(rows[2]) == ("projector", projector, 0, 4 * projector)


def loss_of(model: nn.Module, stage: str) -> Tensor:
    images, expert = pixels(6, KINDS["siglip"].size), torch.arange(6) % experts_of(stage)
    if stage == "router":
        tower = find_tower(model)
        return nn.functional.cross_entropy(tower.router(tower.router_features(images)), expert)
    return nn.functional.cross_entropy(model(images, expert), torch.arange(6) % 5)


@pytest.mark.parametrize("stage", [s for s in STAGES if s != "clone"])
@pytest.mark.parametrize("make_optimizer", [SGD, torch.optim.AdamW])
def test_frozen_parameters_get_no_gradient_and_do_not_move(stage: str, make_optimizer) -> None:
    torch.manual_seed(0)
    model = Classifier(make("siglip", num_experts=experts_of(stage))).train()
    loss_of(model, "experts" if experts_of(stage) == 3 else "joint").backward()  # old gradients
    set_stage(model, stage)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = ExpertOptimizer(model, make_optimizer)
    loss_of(model, stage).backward()
    trains = {n for n, p in model.named_parameters() if part_of(n) in TRAINS[stage]}
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trains
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == trains


def test_what_does_not_fit_is_refused() -> None:
    tower, single = make("siglip"), make("siglip", num_experts=1)
    refused(
        lambda: set_stage(tower, "expert"),
        "set_stage: stage must be one of alignment, ",
        "got expert",
    )
    for stage in ("alignment", "knowledge", "joint"):
        refused(
            lambda s=stage: set_stage(tower, s),
            "set_stage: model must have one expert",
            stage,
            "got 3",
        )
    for model, count in ((nn.Linear(2, 2), 0), (nn.ModuleList([tower, single]), 2)):
        for call in (lambda m: set_stage(m, "experts"), find_tower, stage_of, grouped_parameters):
            refused(lambda m=model, c=call: c(m), "exactly one FusedMixpertTower", f"got {count}")
    refused(
        lambda: set_stage(single, "clone"), "set_stage: num_experts must be at least 1", "got None"
    )
    for wrong in (0, -1, 2.0, True):
        refused(
            lambda w=wrong: set_stage(single, "clone", num_experts=w),
            "num_experts must be at least",
            str(wrong),
        )
    refused(
        lambda: set_stage(tower, "clone", num_experts=4), "num_experts must be None or 3", "got 4"
    )
    refused(
        lambda: set_stage(tower, "clone", num_experts=1), "num_experts must be None or 3", "got 1"
    )
    refused(lambda: set_stage(tower, "experts", num_experts=3), "num_experts must be None", "got 3")
    assert stage_of(tower) is None and stage_of(single) is None
    assert all(p.requires_grad for p in tower.parameters())  # nothing was begun


# clone


@kinds
def test_after_clone_every_route_gives_what_the_one_expert_gave(kind: str, monkeypatch) -> None:
    reference_only(monkeypatch)
    tower = make(kind, num_experts=1, final_norm=kind != "siglip")
    images = pixels(4, KINDS[kind].size)
    want = run(tower, images, 0)
    plain = [m.state_dict() for m in tower.export_expert(0)]
    set_stage(tower, "clone", num_experts=4)
    for routes in (0, 1, 2, 3, [3, 0, 2, 1], [1, 1, 3, 1]):
        assert torch.equal(run(tower, images, routes), want)
    for e in range(4):
        for module, state in zip(tower.export_expert(e), plain, strict=True):
            got = module.state_dict()
            kept = [n for n in state if "head." not in n and "pooler" not in n]  # not of the tower
            assert all(torch.equal(got[n], state[n]) for n in kept)
    assert tower.config.num_experts == 4
    assert all(
        m.num_experts == 4 for m in tower.modules() if isinstance(m, ExpertBlock | GroupedLinear)
    )
    assert sum(isinstance(m, GroupedLinear) for m in tower.modules()) >= 8
    assert all(p.shape[0] == 4 and p.is_contiguous() for p in grouped_parameters(tower).values())
    assert tower(images).router_scores.shape == (4, 4)
    assert tower.config.expert_names is None


def test_experts_are_apart_after_clone() -> None:
    tower = make("siglip", num_experts=1)
    set_stage(tower, "clone", num_experts=3)
    parameters = list(grouped_parameters(tower).values())
    with torch.no_grad():
        for p in parameters:
            p[1] += 1
    assert all(torch.equal(p[0], p[2]) and not torch.equal(p[0], p[1]) for p in parameters)


@kinds
def test_clone_keeps_the_fused_plans(kind: str, monkeypatch) -> None:
    tower = make(kind, num_experts=1)
    plans = [block.plan for block in (*tower.experts, tower.projector)]
    set_stage(tower, "clone", num_experts=2)
    assert [block.plan for block in (*tower.experts, tower.projector)] == plans
    calls: list[int] = []
    plan_run = PreNormPlan.run
    monkeypatch.setattr(
        PreNormPlan,
        "run",
        lambda self, b, x, r: calls.append(r.num_experts) or plan_run(self, b, x, r),
    )
    run(tower, pixels(2, KINDS[kind].size), [0, 1])
    assert calls.count(2) == (2 if KINDS[kind].fused else 0)


def test_clone_of_a_tower_that_has_its_experts() -> None:
    tower = make("dinov2")
    router = copy.deepcopy(tower.router.state_dict())
    first = {n: p[0].clone() for n, p in grouped_parameters(tower).items()}
    for options in ({}, {"num_experts": 3}):
        with torch.no_grad():
            tower.projector.block[0].bias[1] = 7.0
        set_stage(tower, "clone", **options)
        for name, p in grouped_parameters(tower).items():
            assert torch.equal(p, first[name].expand_as(p)), name
    assert all(torch.equal(v, router[n]) for n, v in tower.router.state_dict().items())


@pytest.mark.parametrize("hidden", [None, 8])
@pytest.mark.parametrize("kind", ["siglip", "dinov2"])
def test_a_cloned_tower_saves_and_loads(kind: str, hidden: int | None, tmp_path) -> None:
    tower = make(kind, num_experts=1, router_hidden=hidden, expert_names=["all"])
    set_stage(tower, "clone", num_experts=3)
    assert tower.config.expert_names is None
    tower.config.expert_names = ["versatile", "chart", "document"]
    tower.config.check()
    with torch.no_grad():
        for p in grouped_parameters(tower).values():
            p.mul_(torch.tensor([1.0, 2.0, 3.0]).view(3, *[1] * (p.ndim - 1)))
    tower.save_pretrained(tmp_path / "t")
    loaded = FusedMixpertTower.from_pretrained(tmp_path / "t")
    state = loaded.state_dict()
    assert state.keys() == tower.state_dict().keys()
    assert all(torch.equal(state[n], v) for n, v in tower.state_dict().items())
    assert loaded.config.expert_names == ["versatile", "chart", "document"]
    images = pixels(3, KINDS[kind].size)
    assert torch.equal(run(loaded, images, [2, 0, 1]), run(tower, images, [2, 0, 1]))


def test_clone_keeps_names_that_fit_and_the_dtype() -> None:
    tower = make("siglip", num_experts=1, expert_names=["all"]).to(torch.bfloat16)
    set_stage(tower, "clone", num_experts=1)
    assert tower.config.expert_names == ["all"]
    set_stage(tower, "clone", num_experts=2)
    assert {p.dtype for p in tower.parameters()} == {torch.bfloat16}


def test_a_cloned_tower_trains() -> None:
    tower = make("siglip", num_experts=1)
    set_stage(tower, "joint")
    set_stage(tower, "clone", num_experts=3)
    set_stage(tower, "experts")
    optimizer = ExpertOptimizer(tower, SGD)
    before = {n: p.detach().clone() for n, p in grouped_parameters(tower).items()}
    tower(pixels(2, (30, 30)), expert=torch.tensor([2, 2])).last_hidden_state.sum().backward()
    optimizer.step()
    for name, p in grouped_parameters(tower).items():
        assert [torch.equal(p[e], before[name][e]) for e in range(3)] == [True, True, False], name


# The guard


def backward(tower: FusedMixpertTower) -> None:
    tower(pixels(2, (30, 30)), expert=torch.tensor([1, 1])).last_hidden_state.sum().backward()


@pytest.mark.parametrize("stock", [SGD, torch.optim.AdamW, torch.optim.RMSprop])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_stock_optimizer_over_experts_raises(stock: Callable, wrapped: bool) -> None:
    tower = make("siglip")
    model = Classifier(tower) if wrapped else tower
    early = stock(model.parameters())
    set_stage(model, "experts")
    late = stock([p for p in model.parameters() if p.requires_grad])
    backward(tower)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for optimizer in (early, late):
        with pytest.raises(RuntimeError) as caught:
            optimizer.step()
        assert "must be an ExpertOptimizer" in str(caught.value)
        assert "of all experts" in str(caught.value)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_the_guard_leaves_others_alone() -> None:
    staged, other, single = make("siglip"), make("siglip"), make("siglip", num_experts=1)
    set_stage(staged, "experts")
    set_stage(single, "experts")
    backward(other)
    SGD(other.parameters()).step()  # no stage
    SGD([p for n, p in staged.named_parameters() if n not in grouped(staged)]).step()
    ours = ExpertOptimizer(staged, SGD)
    backward(staged)
    ours.step()  # nor do its inner optimizers
    single(pixels(1, (30, 30)), expert=torch.tensor([0])).last_hidden_state.sum().backward()
    SGD(grouped(single).values()).step()  # of one expert: a stock optimizer does no harm
    set_stage(staged, "router")
    staged.zero_grad()
    SGD(staged.parameters()).step()  # another stage


def test_the_guard_keeps_no_model_alive() -> None:
    tower = make("siglip")
    set_stage(tower, "experts")
    ExpertOptimizer(tower, SGD)
    alive = weakref.ref(tower)
    del tower
    gc.collect()
    assert alive() is None
