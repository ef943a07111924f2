"""Mixpertized models whose parts accelerate keeps on several devices, on the disk, or moves between calls."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from _mllms import EXPERTS, KINDS, Kind
from accelerate.hooks import (
    AlignDevicesHook,
    add_hook_to_module,
    attach_execution_device_hook,
    remove_hook_from_submodules,
)
from test_mllm_parity import assert_close, mixed
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageTextToText

from mixpert_kernels.hf.mllm import forced_routing, mixpertize, record_routing, unmixpertize
from mixpert_kernels.hf.mllm.families import mllm_of

families = pytest.mark.parametrize("family", KINDS)
# transformers' own forward reads these models' parameters and buffers around the hooks that fetch them.
PLAIN_FAILS = {("idefics3", "vision"), ("idefics3", "all")}
GENERATE_FAILS = {("llava_next", "all"), ("llava_onevision", "all")}


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def device_map(model: nn.Module, **places: str) -> dict[str, str]:
    """Where each part goes: ``vision``, ``projector``, ``router``, and all else by ``language``."""
    family = mllm_of(model.config)
    parts = {family.tower: "vision", family.projector: "projector", "mixpert_router": "router"}
    names = [name for name, _ in model.model.named_children()]
    found = {f"model.{name}": places[parts.get(name, "language")] for name in names}
    own = {f"model.{name}": "cpu" for name, _ in model.model.named_parameters(recurse=False)}
    return {**found, **own, "lm_head": places["language"]}


PLACES = {
    "vision": {"vision": "disk", "projector": "disk", "router": "disk", "language": "cpu"},
    "projector": {"vision": "cpu", "projector": "disk", "router": "cpu", "language": "cpu"},
    "router": {"vision": "cpu", "projector": "cpu", "router": "disk", "language": "cpu"},
    "language": {"vision": "cpu", "projector": "cpu", "router": "cpu", "language": "disk"},
}


class Model:
    """A mixpertized model of distinct experts, with what it gives, on the disk."""

    def __init__(self, kind: Kind, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        self.model = mixed(kind, distinct=True, router_hidden=8)
        self.model.save_pretrained(folder / "model")
        self.inputs = kind.call(kind.prompts["batch"])
        self.logits, self.experts = self.call(self.model)
        self.forced = [self.call(self.model, expert)[0] for expert in range(EXPERTS)]
        self.tokens = self.model.generate(**self.inputs, max_new_tokens=3, do_sample=False)

    def load(self, places: Any, **options: Any) -> nn.Module:
        options = {"offload_folder": self.folder / "offload", **options}
        return AutoModelForImageTextToText.from_pretrained(
            self.folder / "model", device_map=places, **options
        )

    def call(self, model: nn.Module, expert: int | None = None) -> tuple[Tensor, list[int]]:
        with forced_routing(model, expert), record_routing(model) as records:
            logits = model(**self.inputs).logits
        (record,) = records
        return logits, record.expert.tolist()

    def check(self, model: nn.Module, generates: bool) -> None:
        for _ in range(2):  # what was fetched has gone again
            logits, experts = self.call(model)
            assert_close(logits, self.logits)
            assert experts == self.experts
        assert_close(self.call(model, 2)[0], self.forced[2])
        if generates:
            tokens = model.generate(**self.inputs, max_new_tokens=3, do_sample=False)
            assert torch.equal(tokens, self.tokens)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    found: dict[str, Model] = {}

    def of(family: str) -> Model:
        if family not in found:
            with torch.no_grad():
                found[family] = Model(KINDS[family], tmp_path_factory.mktemp(family))
        return found[family]

    return of


def offloaded(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.is_meta}


@pytest.mark.parametrize(
    "family, where",
    [(family, where) for family in KINDS for where in ("vision", "all")]
    + [(family, where) for family in ("llava", "gemma3", "internvl") for where in list(PLACES)[1:]],
)
def test_parts_that_wait_on_the_disk_between_calls(family, where, made):
    one = made(family)
    places = {"": "disk"} if where == "all" else device_map(one.model, **PLACES[where])
    model = one.load(places)
    away = tuple(name for name, place in places.items() if place == "disk")
    wanted = {name for name, _ in model.named_parameters() if name.startswith(away)}
    assert offloaded(model) == wanted
    if (family, where) in PLAIN_FAILS:
        return
    one.check(model, where in ("language", "all") and (family, where) not in GENERATE_FAILS)
    assert offloaded(model) == wanted


@families
def test_device_map_auto_cuts_where_it_may(family, made):
    """Some memory, from hardly any to all there is: blocks and the projector are never cut."""
    one = made(family)
    size = sum(p.numel() * 4 for p in one.model.parameters())
    cut = []
    for part in (0.35, 0.7):
        model = one.load("auto", max_memory={"cpu": int(size * part)})
        away = offloaded(model)
        cut.append(len(away))
        for name, module in model.named_modules():
            if (
                hasattr(module, "mixpert_template")
                and type(module).__name__ in model._no_split_modules
            ):
                own = [f"{name}.{n}" in away for n, _ in module.named_parameters()]
                assert all(own) or not any(own), name
        if family != "idefics3":
            one.check(model, generates=False)
    assert cut[0] > cut[1] > 0
    *_, projector = [m for m in model.modules() if hasattr(m, "mixpert_template")]
    assert type(projector).__name__ in model._no_split_modules


@families
def test_a_model_in_memory_is_dispatched_and_taken_back(family, made):
    one = made(family)
    model = one.load(None)
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert offloaded(model) == {name for name, _ in model.named_parameters()}
    if family != "idefics3":
        one.check(model, (family, "all") not in GENERATE_FAILS)
    remove_hook_from_submodules(model)
    one.check(model, generates=True)


class OneDevice(TorchDispatchMode):
    """Refuses an op of ours whose tensors are on several devices."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace.startswith("mixpert"):
            flat, _ = torch.utils._pytree.tree_flatten((args, kwargs))
            found = {t.device.type for t in flat if isinstance(t, Tensor)}
            assert len(found) == 1, f"{func}: {found}"
            self.devices += found
        return func(*args, **(kwargs or {}))


def move(module: nn.Module, device: str) -> None:
    """As dispatch_model does for a part that is on another device than the one before it."""
    add_hook_to_module(module, AlignDevicesHook(device, place_submodules=True))
    attach_execution_device_hook(module, device)


class Stop(Exception):
    pass


@families
@pytest.mark.parametrize("routes", [None, 1, [2, 0, 1, 0]], ids=["router", "one", "each"])
@pytest.mark.parametrize("where", ["tower", "block", "projector"])
def test_features_and_routes_follow_to_another_device(family, where, routes, monkeypatch):
    """The other device is one without values here, so nothing comes back from it: the call ends there."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it has none
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    reads = {"tower": ("idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl")}
    reads["block"] = reads["tower"][2:]
    if family in reads.get(where, ()):
        return  # transformers itself reads a mask, or where images end, on the host there
    if where != "projector" and family in ("qwen2_vl", "qwen2_5_vl"):
        return  # and the lengths of images here, before the attention
    kind = KINDS[family]
    model, inputs = mixed(kind, distinct=True), kind.call(kind.prompts["batch"])
    *_, block, projector = [m for m in model.modules() if hasattr(m, "mixpert_template")]
    parts = {"tower": [model.model.get_submodule(mllm_of(model.config).tower), projector]}
    moved = parts.get(where, [block if where == "block" else projector])
    for part in moved:
        move(part, "meta")

    def stop(*_: Any) -> None:
        raise Stop

    moved[-1].register_forward_hook(stop)
    with OneDevice() as seen, forced_routing(model, routes), pytest.raises(Stop):
        model(**inputs)
    if (family, where) != ("gemma3", "projector"):  # whose product is a plain matmul
        assert set(seen.devices) == ({"meta"} if where == "tower" else {"cpu", "meta"})


def test_a_dispatched_model_is_neither_given_experts_nor_freed_of_them(tmp_path):
    """Its hooks hold methods of the classes it had before."""
    kind = KINDS["llava"]
    match = "^{}: model must not be dispatched .*, got a hooked LlavaForConditional"
    places = {"": "disk"}
    kind.build().save_pretrained(tmp_path / "plain")
    options = {"device_map": places, "offload_folder": tmp_path / "offload"}
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "plain", **options)
    with pytest.raises(ValueError, match=match.format("mixpertize")):
        mixpertize(plain)
    assert not hasattr(plain.config, "mixpert")
    model = mixed(kind)
    accelerate.cpu_offload(model)
    with pytest.raises(ValueError, match=r"^unmixpertize: model must not be dispatched"):
        unmixpertize(model)
    one = kind.build()
    add_hook_to_module(one.model.vision_tower, AlignDevicesHook("cpu"))
    with pytest.raises(
        ValueError, match="got a hooked CLIPVisionModel: load it without device_map"
    ):
        mixpertize(one)


@pytest.mark.gpu
@families
@pytest.mark.parametrize("vision", ["cuda:0", "cpu"])
def test_vision_on_one_device_and_language_on_the_other(family, vision, made):
    """By from_pretrained, where a CPU's part waits there for the GPU, and by dispatch_model, where each computes."""
    one = made(family)
    other = "cpu" if vision == "cuda:0" else "cuda:0"
    places = device_map(one.model, vision=vision, projector=vision, router=other, language=other)
    model = mixed(KINDS[family], distinct=True, router_hidden=8)
    model.load_state_dict(one.model.state_dict())
    dispatched = accelerate.dispatch_model(model, places, main_device="cpu")
    assert {p.device.type for p in dispatched.parameters()} == {"cuda", "cpu"}
    for built in (one.load(places), dispatched):
        logits, experts = one.call(built)
        assert experts == one.experts
        assert float((logits.cpu() - one.logits).abs().max() / one.logits.abs().max()) < 1e-3
        tokens = built.generate(**one.inputs, max_new_tokens=3, do_sample=False)
        assert tokens.shape == one.tokens.shape


@pytest.mark.parametrize("place", ["cpu", "auto", {"": "cpu"}])
def test_a_model_on_one_device_is_given_experts(place, tmp_path):
    kind = KINDS["llava"]
    kind.build().save_pretrained(tmp_path)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path, device_map=place)
    wanted = plain(**(inputs := kind.call([[1, 1]]))).logits
    assert_close(mixed(kind, model=plain)(**inputs).logits, wanted)
