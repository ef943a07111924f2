"""A mixpertized model waits for the device where the plain model does, and nowhere else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from _gpu_with_values import GPU, OnGpu, move, put, take, waits
from _mllms import EXPERTS, KINDS, Kind
from test_mllm_parity import assert_close, mixed
from torch import Tensor, nn

from mixpert_kernels.hf.mllm import forced_routing, record_routing, scope

families = pytest.mark.parametrize("family", KINDS)
GENERATE = {"max_new_tokens": 3, "do_sample": False}
READ_ONCE = (
    "llava_next",
    "llava_onevision",
)  # image_sizes, which their own code reads again and again


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def counted(model: nn.Module, kind: Kind, **forced: Any) -> list[Counter[str]]:
    """The waits of a forward and of a generate that follow their likes."""
    prompts = kind.prompts["batch"]
    inputs = {name: put(value) for name, value in kind.call(prompts).items()}
    found = []
    for call in (lambda: model(**inputs), lambda: model.generate(**inputs, **GENERATE)):
        with waits() as seen:
            if forced:
                with forced_routing(model, **forced), record_routing(model):
                    call()
            else:
                call()
        found.append(seen)
    return found


@families
def test_no_waits_beyond_the_plain_models(family):
    kind = KINDS[family]
    plain = counted(move(kind.build()), kind)
    model = move(mixed(kind))
    images = sum(map(len, kind.prompts["batch"]))
    routes = torch.arange(images) % EXPERTS
    for forced in ({}, {"expert": routes}, {"expert": put(routes)}, {"expert": 1}):
        for got, wanted in zip(counted(model, kind, **forced), plain, strict=True):
            assert wanted
            if family in READ_ONCE:
                assert sum(got.values()) < sum(wanted.values())
                ours = [what for what in got - wanted if "to_host" not in what]
                assert not ours
            else:
                assert got == wanted


def test_images_from_the_caller_are_not_waited_for():
    kind = KINDS["gemma3"]
    plain = counted(move(kind.build()), kind)
    model, tiles = move(mixed(kind)), sum(n for prompt in kind.prompts["batch"] for n in prompt)
    image_of_tile = torch.arange(tiles) // 2
    assert counted(model, kind, image_of_tile=image_of_tile) == plain


@families
def test_the_gpu_that_is_not_there_computes_what_the_cpu_does(family):
    kind = KINDS[family]
    model, inputs = mixed(kind), kind.call(kind.prompts["batch"])
    wanted = model(**inputs).logits
    move(model)
    with waits(), record_routing(model) as records:
        got = model(**{name: put(value) for name, value in inputs.items()}).logits
    assert got.device == records[0].expert.device == model.device == GPU
    assert_close(take(got), wanted)


def test_a_wait_in_the_router_is_seen(monkeypatch):
    kind = KINDS["llava"]
    plain, route = counted(move(kind.build()), kind), scope.Scope.route

    def waiting(self: scope.Scope, x: Tensor) -> Any:
        x.sum().item()
        return route(self, x)

    monkeypatch.setattr(scope.Scope, "route", waiting)
    for got, wanted in zip(counted(move(mixed(kind)), kind), plain, strict=True):
        (new,) = (got - wanted).items()
        assert "waiting" in new[0] and new[1] == 2  # one a block with experts


WAITING: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x[0].item(),
    "int": lambda x: int(x[0]),
    "if": lambda x: bool(x[0] > 0),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "repeat_interleave": lambda x: x.repeat_interleave(x),
    "index on the host": lambda x: x[torch.tensor([0, 1])],
    "from a list": lambda x: torch.tensor([1, 2], device=x.device),
    "from the host": lambda x: torch.ones(2).to(x.device),
}
GOING_ON: dict[str, Callable[[Tensor], Any]] = {
    "arithmetic": lambda x: (x + 1).cumsum(0)[:2],
    "made there": lambda x: torch.arange(3, device=x.device) + x,
    "index": lambda x: x[torch.argsort(x)],
    "repeat_interleave": lambda x: x.repeat_interleave(x, output_size=3),
    "not blocking": lambda x: torch.ones(2).to(x.device, non_blocking=True),
    "its own device": lambda x: x.to(x.device, torch.float32),
}


@pytest.mark.parametrize("what", WAITING)
def test_what_waits(what):
    x = put(torch.tensor([0, 1, 2]))
    with waits() as seen:
        WAITING[what](x)
    assert sum(seen.values()) == 1


@pytest.mark.parametrize("what", GOING_ON)
def test_what_does_not(what):
    x = put(torch.tensor([0, 1, 2]))
    with waits() as seen:
        y = GOING_ON[what](x)
    assert isinstance(y, OnGpu) and not seen


def test_what_is_on_the_host_is_read_for_free():
    with waits() as seen:
        assert torch.arange(3).tolist() == [0, 1, 2]
    assert not seen
