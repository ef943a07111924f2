"""What a training step costs and touches: a frozen trunk keeps nothing, the experts keep no activation twice."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from _towers import EXPERTS, KINDS, assert_close, grouped, make, pixels

from mixpert_kernels import FusedMixpertTower, Routing
from mixpert_kernels.modules import PreNormPlan

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
if (
    not torch.cuda.is_available()
):  # the harness would take the GPU; these counts are the same on any device
    baselines, memory, models = map(importlib.import_module, ("_baselines", "_memory", "_models"))

SIZE = KINDS["siglip"].size
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="counts tensors in float32 on a CPU")


def frozen_trunk(kind: str = "siglip") -> FusedMixpertTower:
    tower = make(kind).train()
    tower.trunk.requires_grad_(False)
    tower.router.requires_grad_(False)
    return tower


def test_a_frozen_trunk_keeps_nothing_for_backward() -> None:
    tower = frozen_trunk()
    images, expert = pixels(3, SIZE), torch.tensor([0, 1, 2])
    parameters = list(tower.parameters())
    with torch.no_grad():
        x = tower.trunk_features(images)
    alone = memory.saved_megabytes(
        lambda: tower.expert_segment(x, Routing.forced(expert, EXPERTS)), parameters
    )

    def whole() -> torch.Tensor:
        return tower(images, expert=expert, output_router=False).last_hidden_state

    assert memory.saved_megabytes(whole, parameters) <= alone
    tower.trunk.requires_grad_()
    assert memory.saved_megabytes(whole, parameters) > 1.5 * alone


@pytest.mark.parametrize("kind", ["siglip", "dinov2", "dinov2_swiglu"])
def test_a_frozen_trunk_gives_the_experts_the_same_gradients(kind: str) -> None:
    images, expert = pixels(3, KINDS[kind].size), torch.tensor([2, 0, 2])

    def gradients(tower: FusedMixpertTower) -> dict[str, torch.Tensor]:
        tower(images, expert=expert).last_hidden_state.square().sum().backward()
        return {name: p.grad for name, p in grouped(tower).items()}

    frozen = frozen_trunk(kind)
    got, want = gradients(frozen), gradients(make(kind).train())
    assert all(p.grad is None for p in frozen.trunk.parameters())
    assert got.keys() == want.keys()
    largest = max(gradient.abs().max() for gradient in want.values())
    for name, gradient in want.items():  # the key's bias has none: all that is there is rounding
        assert (got[name] - gradient).abs().max() <= 1e-5 * largest, name


def test_a_frozen_trunk_runs_by_its_plans_in_training(monkeypatch) -> None:
    trunk_blocks = []
    run = PreNormPlan.run

    def spy(plan, block, x, routing):
        trunk_blocks.append(routing.num_experts == 1)
        return run(plan, block, x, routing)

    tower = frozen_trunk()
    monkeypatch.setattr(PreNormPlan, "run", spy)
    tower(pixels(2, SIZE), expert=torch.tensor([0, 1]))
    assert sum(trunk_blocks) == len(tower.trunk.encoder.layers)
    trunk_blocks.clear()
    tower.trunk.encoder.layers[0].mlp.fc1.bias.requires_grad_()
    tower(pixels(2, SIZE), expert=torch.tensor([0, 1])).last_hidden_state.sum().backward()
    assert not any(trunk_blocks)
    assert tower.trunk.encoder.layers[0].mlp.fc1.bias.grad.abs().sum() > 0


def test_pixels_that_want_a_gradient_get_it_through_a_frozen_trunk() -> None:
    images = pixels(2, SIZE).requires_grad_()
    frozen_trunk()(images, expert=torch.tensor([0, 1])).last_hidden_state.sum().backward()
    assert images.grad.abs().sum() > 0


@on_cpu
@pytest.mark.parametrize("expert", [[0, 1, 2, 3], [0, 1, 0, 2], [1, 1, 1, 1]])
def test_the_experts_keep_a_quarter_less_than_the_strong_loop(expert: list[int]) -> None:
    """In the proportions of SigLIP-base; docs/math.md says what is kept."""
    geometry = models.Geometry("small", 48, 4, 192, 3, 56, 14, 128)
    ours, plain = models.towers(geometry)
    stacked = baselines.StackedWeights(plain)
    for parameter in stacked.parameters():
        parameter.requires_grad_()
    ids = torch.tensor(expert)
    x = torch.randn(len(ids), geometry.tokens, geometry.hidden)

    def loop() -> torch.Tensor:
        order, inverse, counts = baselines.Sorted.of(ids)
        return baselines.strong_loop(stacked, x[order], counts)[inverse]

    def experts() -> torch.Tensor:
        return ours.expert_segment(x, Routing.forced(ids, models.NUM_EXPERTS))

    assert_close(experts().detach(), loop().detach(), 1e-4)
    theirs = memory.saved_megabytes(loop, [x, *stacked.parameters()])
    mine = memory.saved_megabytes(experts, [x, *ours.parameters()])
    assert mine <= 0.75 * theirs, (mine, theirs)
