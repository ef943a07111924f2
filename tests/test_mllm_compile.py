"""torch.compile of a mixpertized vision-language model: where the plain model is one graph so is it, for all routes."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator

import pytest
import torch
from _mllms import EXPERTS, KINDS, Kind
from test_mllm_parity import assert_close, mixed
from torch import Tensor, nn

from mixpert_kernels.hf.mllm import forced_routing, record_routing

ONE_GRAPH = ("llava", "gemma3", "internvl")
BROKEN = (
    "llava_onevision",
)  # its own code reads image_sizes, so that the compiler leaves it for a while
PACKED = ("qwen2_5_vl",)  # its code reads the grids, in the tower too
GENERATE = {"max_new_tokens": 3, "do_sample": False}

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler"
)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def small(kind: Kind) -> nn.Module:
    """Two vision blocks: tracing takes its time."""
    vision = dict(kind.config["vision_config"])
    vision["depth" if "depth" in vision else "num_hidden_layers"] = 2
    model = kind.build(vision_config=vision)
    model = mixed(kind, distinct=True, model=model, expert_layers=1)
    model(**kind.call(kind.prompts["batch"]))  # transformers installs its hooks, which no graph can
    return model


def routes(images: int) -> list[Tensor]:
    """Forced ones, all different."""
    return [(torch.arange(images) + shift) // (1 + shift) % EXPERTS for shift in range(3)]


def compiled(call, backend: str = "eager", fullgraph: bool = True):
    return torch.compile(call, backend=backend, fullgraph=fullgraph, dynamic=False)


@pytest.mark.parametrize("family", [*ONE_GRAPH, *BROKEN, *PACKED])
def test_prefill(family):
    kind = KINDS[family]
    model, prompts = small(kind), kind.prompts["batch"]
    fast = compiled(model.forward, fullgraph=family in ONE_GRAPH)
    images, seen = sum(map(len, prompts)), []
    inputs = [kind.call(prompts, seed) for seed in (0, 1)]
    assert_close(fast(**inputs[0]).logits, model(**inputs[0]).logits)  # the router's own routes
    with record_routing(model) as records:
        for i, expert in enumerate(routes(images)):
            with forced_routing(model, expert):
                got = fast(**inputs[i % 2]).logits
                seen.append(graphs())
                assert_close(got, model(**inputs[i % 2]).logits)
    assert [r.expert.tolist() for r in records[::2]] == [r.tolist() for r in routes(images)]
    assert [r.expert.tolist() for r in records[1::2]] == [r.tolist() for r in routes(images)]
    assert len(set(seen)) == 1
    if family in ONE_GRAPH:
        assert seen[0] == 2  # without and with forced routes


@pytest.mark.parametrize("family", ONE_GRAPH)
def test_the_routers_own_routes_need_no_recompilation(family):
    kind = KINDS[family]
    model, prompts = small(kind), kind.prompts["batch"]
    fast, found = compiled(model.forward), set()
    with record_routing(model) as records:
        for seed in range(4):
            inputs = kind.call(prompts, seed)
            generator = torch.Generator().manual_seed(seed)
            for parameter in model.base_model.mixpert_router.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            assert_close(fast(**inputs).logits, model(**inputs).logits)
            got, want = records[-2], records[-1]
            assert torch.equal(got.expert, want.expert)
            torch.testing.assert_close(got.scores, want.scores)
            found.add(tuple(want.expert.tolist()))
    assert len(found) > 1 and graphs() == 1


@needs_compiler
def test_inductor():
    kind = KINDS["llava"]
    model, inputs = small(kind), kind.call([[1, 1]])
    fast = compiled(model.forward, "inductor")
    for expert in routes(2):
        with forced_routing(model, expert):
            assert_close(fast(**inputs).logits, model(**inputs).logits)
    assert graphs() == 1


@pytest.mark.parametrize("family", [*ONE_GRAPH, *BROKEN])
def test_tower_and_projector(family):
    kind = KINDS[family]
    model, prompts = small(kind), kind.prompts["batch"]
    images, owner = sum(map(len, prompts)), model.base_model
    wanted, seen = [], []
    for run in range(2):
        for expert in routes(images):
            with forced_routing(model, expert):
                logits = model(**kind.call(prompts)).logits
            if run:
                assert_close(logits, wanted.pop(0))
                seen.append(graphs())
            else:
                wanted.append(logits)
        for part in (owner.vision_tower, owner.multi_modal_projector):
            part.compile(backend="eager", fullgraph=True, dynamic=False)
    assert seen == [2] * 3  # one each


@pytest.mark.parametrize("family", [*ONE_GRAPH, *BROKEN])
def test_generate(family):
    kind = KINDS[family]
    model, prompts = small(kind), kind.prompts["one image"]
    inputs, expert = kind.call(prompts), torch.tensor([2])
    with forced_routing(model, expert):
        wanted = model.generate(**inputs, **GENERATE)
        model.forward = functools.wraps(model.forward)(compiled(model.forward, fullgraph=False))
        output = model.generate(**inputs, **GENERATE, return_dict_in_generate=True)
    assert graphs() > 0
    assert torch.equal(output.sequences, wanted)
    assert [record.expert.tolist() for record in output.router] == [[2]]


def test_gradients_are_those_of_eager():
    kind = KINDS["llava"]
    model, prompts = small(kind).train(), kind.prompts["batch"]
    inputs, expert = kind.call(prompts), routes(4)[1]
    found = []
    for call in (model.forward, compiled(model.forward, "aot_eager")):
        model.zero_grad()
        with torch.enable_grad(), forced_routing(model, expert), record_routing(model) as records:
            loss = call(**inputs, labels=inputs["input_ids"]).loss
            (loss - records[0].scores[:, 0].log().mean()).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    got, want = found[1], found[0]
    assert got.keys() >= want.keys() and any("mixpert_router" in name for name in want)
    for name, gradient in got.items():  # to blocks after the feature's the compiler gives zeros
        torch.testing.assert_close(gradient, want.get(name, gradient * 0), rtol=1e-3, atol=1e-6)
