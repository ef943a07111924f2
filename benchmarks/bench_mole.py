"""An LLM's FFN with four adapters, of which each sample gets one: prefill, one token, and a training step.

`ours` against all four adapters on every sample, as MoME's own code computes them (`dense_4`), against a loop over
masks that gathers each adapter's samples (`mask_gather`), one adapter without a choice (`one_adapter`, and ours,
`ours_one`), and the FFN alone (`plain_ffn`, ratio 1). In training the FFN is frozen; adapters, router and input get
gradients, and compared are the input's and the router's; a mask has no gradient for the router.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from _adt_baselines import Launches
from _harness import DEVICE, DTYPE, SIZE, Output, Scenario, Variant
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mixpert_kernels.backends.reference import grouped_adapter as reference
from mixpert_kernels.modules import Instruction, MixtureOfLanguageExperts
from mixpert_kernels.modules.mole import ADAPTER
from mixpert_kernels.testing import randomize_

contract = importlib.import_module("mixpert_kernels.ops.grouped_adapter")
EXPERTS, SENTENCE = 4, 384
BATCH = 4


class Geometry(NamedTuple):
    name: str
    width: int
    intermediate: int
    hidden: int
    tokens: int  # of a prompt with its image


GEOMETRY = {
    "ci": Geometry("tiny", 64, 172, 16, 12),
    "default": Geometry("LLM of width 1024", 1024, 2816, 64, 600),
    "full": Geometry("Llama-7B", 4096, 11008, 64, 600),
}[SIZE]
CASES = ("prefill", "token", "training")
VARIANTS = ("plain_ffn", "one_adapter", "ours_one", "ours", "dense_4", "mask_gather")


class FFN(nn.Module):
    """Llama's."""

    def __init__(self, width: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, intermediate, bias=False)
        self.up_proj = nn.Linear(width, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Case:
    """One layer, and the tensors of a scenario."""

    def __init__(self, kind: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.train, self.instruction = kind == "training", Instruction()
        ffn = FFN(GEOMETRY.width, GEOMETRY.intermediate)
        self.mole = randomize_(self.module(ffn, EXPERTS))
        sentences = torch.randn(512, SENTENCE, generator=generator)
        chosen = self.mole.probabilities(sentences).argmax(1).tolist()
        known = sorted(set(chosen))
        self.sentences = sentences[[chosen.index(known[b % len(known)]) for b in range(BATCH)]]
        self.one = self.module(ffn, 1)
        first = {n: p[:1] for n, p in self.mole.state_dict().items() if n in ADAPTER}
        self.one.load_state_dict(first, strict=False)
        for module in (self.mole, self.one):
            module.to(DEVICE, DTYPE).ffn.requires_grad_(False)
        self.sentences = self.sentences.to(DEVICE)
        self.instruction.set(self.sentences)
        tokens = 1 if kind == "token" else GEOMETRY.tokens
        self.x = torch.randn(BATCH, tokens, GEOMETRY.width, generator=generator).to(DEVICE, DTYPE)

    def module(self, ffn: nn.Module, experts: int) -> MixtureOfLanguageExperts:
        sizes = {"hidden": GEOMETRY.hidden, "sentence_width": SENTENCE}
        return MixtureOfLanguageExperts(
            ffn, GEOMETRY.width, experts=experts, instruction=self.instruction, **sizes
        )

    def plain_ffn(self, mole: MixtureOfLanguageExperts, x: Tensor) -> Tensor:
        return mole.ffn(x)

    def one_adapter(self, mole: MixtureOfLanguageExperts, x: Tensor) -> Tensor:
        return mole.ffn(x) + adapter(mole, 0, x)

    def ours(self, mole: MixtureOfLanguageExperts, x: Tensor) -> Tensor:
        return mole(x)

    def ours_one(self, mole: MixtureOfLanguageExperts, x: Tensor) -> Tensor:
        return self.one(x)

    def dense_4(self, mole: MixtureOfLanguageExperts, x: Tensor) -> Tensor:
        p = mole.probabilities(self.sentences)
        gate = F.one_hot(p.argmax(1), EXPERTS) - p.detach() + p
        outputs = (adapter(mole, k, x) * gate[:, k, None, None].to(x.dtype) for k in range(EXPERTS))
        return mole.ffn(x) + sum(outputs)

    def mask_gather(self, mole: MixtureOfLanguageExperts, x: Tensor) -> Tensor:
        chosen = mole.probabilities(self.sentences).argmax(1)
        y = mole.ffn(x)
        for k in range(EXPERTS):
            rows = (chosen == k).nonzero().squeeze(1)  # the host waits here
            if len(rows):
                y = y.index_add(0, rows, adapter(mole, k, x[rows]))
        return y

    def run(self, name: str, mole: MixtureOfLanguageExperts, x: Tensor) -> Output:
        """The output; in training the gradients of the input and, where there is one, of the router's last layer."""
        if not self.train:
            return getattr(self, name)(mole, x)
        module = self.one if name == "ours_one" else mole
        trained = {n: p for n, p in module.named_parameters() if not n.startswith("ffn.")}
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = getattr(self, name)(mole, x.view_as(x))  # the counter wants no leaf
            dy = torch.ones_like(y)
            dy[..., ::2] = -0.5
            dx, *grads = torch.autograd.grad(y, (x, *trained.values()), dy, allow_unused=True)
        router = dict(zip(trained, grads, strict=True)).get("router.2.weight")
        return dx if router is None else (dx, router[None])

    def truth(self, name: str) -> Output:
        """In float32, or float64 on a CPU, by the loop, or by all adapters where the router has a gradient."""
        plain = {"ours": "mask_gather", "ours_one": "one_adapter"}.get(name, name)
        if name == "ours" and self.train:
            plain = "dense_4"
        wide = torch.float64 if DEVICE.type == "cpu" else torch.float32
        return self.run(plain, copy.deepcopy(self.mole).to(wide), self.x.to(wide))

    def cost(self, name: str) -> dict[str, float]:
        """Operations computed, in GFLOP, and calls of ops: launches, on a GPU, where an op is one."""
        with torch.no_grad():
            self.run(name, self.mole, self.x)  # a request is routed once
            with Launches() as launches:
                self.run(name, self.mole, self.x)
            with operations() as count:
                self.run(name, self.mole, self.x)
        return {"ops": launches.count, "gflop": count() / 1e9}


def adapter(mole: MixtureOfLanguageExperts, k: int, x: Tensor) -> Tensor:
    hidden = F.linear(x, mole.down[k], mole.down_bias[k]).relu()
    return F.linear(hidden, mole.up[k], mole.up_bias[k]) * mole.scale[k]


@contextlib.contextmanager
def operations() -> Iterator[Callable[[], int]]:
    """Counts operations, also those inside grouped_adapter, by its reference: a counter sees no further than an op."""
    inside = []

    class Counting:
        def __getattr__(self, name: str) -> Callable:
            def run(*args: object) -> object:
                with FlopCounterMode(display=False) as counter:
                    result = getattr(reference, name)(*args)
                inside.append(counter.get_total_flops())
                return result

            return run

    outside = FlopCounterMode(display=False)
    with mock.patch.object(contract, "_pick", lambda *_: Counting()), outside:
        yield lambda: outside.get_total_flops() + sum(inside)


@functools.lru_cache(maxsize=1)
def setup(kind: str) -> Case:
    return Case(kind)


def scenario(kind: str) -> Scenario:
    case = setup(kind)

    def variant(name: str) -> Variant:
        def build() -> Callable[[], Output]:
            return lambda: case.run(name, case.mole, case.x)

        return Variant(name, build, functools.partial(case.truth, name), case.cost(name))

    return Scenario(
        name=f"mole {GEOMETRY.name}, {kind}, B={BATCH}, T={case.x.shape[1]}",
        truth=lambda: case.truth("plain_ffn"),
        base="plain_ffn",
        variants=tuple(variant(name) for name in VARIANTS),
        info={"bench": "mole", "geometry": GEOMETRY.name, "batch": BATCH, "route": "mixed"},
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", CASES)
def test_mole(record: Callable[..., None], kind: str, variant: str) -> None:
    record(scenario, kind, variant=variant)
