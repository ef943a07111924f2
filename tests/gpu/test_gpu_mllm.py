"""A mixpertized vision-language model on a GPU: it waits where the plain model does, and nowhere else."""

from __future__ import annotations

import warnings

import pytest
import torch
from _mllms import EXPERTS, KINDS
from _on_gpu import DEVICE, backend, only
from test_mllm_parity import mixed
from torch import nn

from mixpert_kernels.hf.mllm import forced_routing, record_routing

__all__ = ["backend", "only"]  # fixtures
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("only")]


@torch.no_grad()
def waits(model: nn.Module, inputs: dict, expert: torch.Tensor | None = None) -> int:
    """How often PyTorch waits in a forward and a generate that are not the first."""

    def call() -> None:
        model(**inputs)
        model.generate(**inputs, max_new_tokens=3, do_sample=False)

    def forced() -> None:
        with forced_routing(model, expert), record_routing(model):
            call()

    run = call if expert is None else forced
    run()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in seen)


@pytest.mark.parametrize("family", KINDS)
def test_no_waits_beyond_the_plain_models(family):
    kind = KINDS[family]
    prompts = kind.prompts["batch"]
    inputs = {name: value.to(DEVICE) for name, value in kind.call(prompts).items()}
    plain = waits(kind.build().to(DEVICE), inputs)
    model = mixed(kind).to(DEVICE)
    expert = torch.arange(sum(map(len, prompts))) % EXPERTS
    assert waits(model, inputs) <= plain
    assert waits(model, inputs, expert) <= plain
    assert waits(model, inputs, expert.to(DEVICE)) <= plain
