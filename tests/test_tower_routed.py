"""Routing in one call with the expert segment's first product: what a GPU runs, here on the CPU's backends."""

from __future__ import annotations

import pytest
import torch
from _towers import KINDS, make, pixels

from mixpert_kernels.hf import tower as tower_module
from mixpert_kernels.modules import ExpertBlock

PLANNED = ("siglip", "clip", "dinov2", "vit")
IMAGES = {
    "a tile an image": {},
    "forced": {"expert": torch.tensor([2, 0, 1, 2, 0])},
    "tiles": {
        "image_of_tile": torch.tensor([0, 0, 1, 1, 1]),
        "base_tile": torch.tensor([1, 2]),
    },
    "tiles, forced": {
        "image_of_tile": torch.tensor([0, 0, 1, 2, 2]),
        "expert": torch.tensor([2, 0, 1]),
    },
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Switch the fused routing on; returns the list of the blocks that were routed so."""
    found = []
    run = ExpertBlock.run_routed

    def counted(self, *args, **kwargs):
        found.append(type(self.block).__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(ExpertBlock, "run_routed", counted)
    monkeypatch.setattr(tower_module, "fuses_routing", lambda x: not torch.is_grad_enabled())
    return found


@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("kind", PLANNED)
def test_equals_routing_first(kind: str, images: str, calls: list[str], monkeypatch) -> None:
    tower = make(kind)
    batch = pixels(5, KINDS[kind].size)
    with torch.no_grad():
        got = tower(batch, **IMAGES[images])
        assert len(calls) == 1
        monkeypatch.setattr(tower_module, "fuses_routing", lambda x: False)
        want = tower(batch, **IMAGES[images])
    assert len(calls) == 1
    assert torch.equal(got.expert, want.expert)
    assert torch.equal(got.router_scores, want.router_scores)
    torch.testing.assert_close(got.last_hidden_state, want.last_hidden_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["dinov2_swiglu", "internvl_rms"])
def test_a_block_without_a_plan_is_routed_first(kind: str, calls: list[str]) -> None:
    with torch.no_grad():
        make(kind)(pixels(3, KINDS[kind].size))
    assert calls == []


def test_with_gradients_routing_comes_first(calls: list[str]) -> None:
    tower = make("siglip")
    tower(pixels(3, KINDS["siglip"].size)).last_hidden_state.sum().backward()
    assert calls == []


@pytest.mark.parametrize("where", ["experts.0.block.mlp.activation_fn", "projector.block.1"])
def test_an_activation_replaced_later_is_used(where: str) -> None:
    """By one the plans do not know: the block's own forward runs."""
    tower = make("siglip")
    batch = pixels(3, KINDS["siglip"].size)
    owner, _, name = where.rpartition(".")
    with torch.no_grad():
        before = tower(batch).last_hidden_state
        setattr(tower.get_submodule(owner), name, torch.nn.Softplus())
        after = tower(batch).last_hidden_state
        setattr(tower.get_submodule(owner), name, torch.nn.Softplus())
        again = tower(batch).last_hidden_state
    assert not torch.allclose(before, after, rtol=1e-2)
    assert torch.equal(after, again)
