"""What every op says of bad input: the argument, the condition and the value, before any work."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from mixpert_kernels import Routing, ops
from mixpert_kernels.ops import RouterWeights, Strategy

NAN = math.nan
X, W, BIAS, GAIN = torch.zeros(2, 3, 4), torch.zeros(2, 5, 4), torch.zeros(2, 5), torch.zeros(2, 4)
ROUTING = Routing.forced(torch.tensor([0, 1]), 2)
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu", "relu")

LINEAR = {
    "x must be a floating-point tensor, got torch.int64": {"x": X.long()},
    "x must be a floating-point tensor, got NoneType": {"x": None},
    "x must have shape (B, T, 4), got (2, 3, 5)": {"x": torch.zeros(2, 3, 5)},
    "x must have shape (B, T, 4), got (2, 4)": {"x": torch.zeros(2, 4)},
    "x must have shape (B, T, 4), got (0, 3, 4)": {"x": torch.zeros(0, 3, 4)},
    "weight must have shape (E, N, K), got (5, 4)": {"weight": W[0]},
    "weight must be a tensor, got NoneType": {"weight": None},
    "weight must hold at least one tensor, got an empty sequence": {"weight": []},
    "weight must have shape (2, N, 4), got (3, 5, 4)": {"weight": [W, torch.zeros(3, 5, 4)]},
    "weight must have the dtype of x, torch.float32, got torch.float64": {"weight": W.double()},
    "weight must be on the device of x, cpu, got meta": {"weight": W.to("meta")},
    "bias must have shape (2, 5), got (2, 4)": {"bias": torch.zeros(2, 4)},
    "bias must have the dtype of x, torch.float32, got torch.float64": {"bias": BIAS.double()},
    "weight must have the dtype of x, torch.bfloat16, got torch.float32": {"x": X.bfloat16()},
    "bias must match weight in number, got 2": {"bias": [BIAS, BIAS]},
    "bias must be a tensor, got NoneType": {"bias": [None]},
    "residual must have shape (2, 3, 5), got (2, 3, 4)": {"residual": X},
    "residual must have the dtype of x, torch.float32, got torch.float64": {
        "residual": torch.zeros(2, 3, 5).double()
    },
    "scale must have shape (2, 5), got (5,)": {"scale": BIAS[0]},
    "scale must be on the device of x, cpu, got meta": {"scale": BIAS.to("meta")},
    f"activation must be one of {ACTIVATIONS}, got silu": {"activation": "silu"},
    "routing must be a Routing, got Tensor": {"routing": ROUTING.expert},
    "routing.expert must have shape (2,), got (3,)": {"routing": Routing.single(3)},
    "routing must be over the weight's 2 experts, got 1": {"routing": Routing.single(2)},
    "routing must be on the device of x, cpu, got meta": {
        "routing": Routing(*(t.to("meta") for t in ROUTING[:3]))
    },
    # the same, of the second alone
    "routing must be on the device of x, cpu, got meta ": {
        "routing": ROUTING._replace(order=ROUTING.order.to("meta"))
    },
    "routing.order must have shape (2,), got (3,)": {
        "routing": ROUTING._replace(order=torch.zeros(3, dtype=torch.int32))
    },
    "routing.order must be a tensor, got NoneType": {"routing": ROUTING._replace(order=None)},
    "routing.offsets must have shape (E + 1,), got (1, 3)": {
        "routing": ROUTING._replace(offsets=ROUTING.offsets[None])
    },
    "routing.expert must have dtype int32, got torch.int64": {
        "routing": ROUTING._replace(expert=ROUTING.expert.long())
    },
    "routing.order must be contiguous, got strides (2,)": {
        "routing": ROUTING._replace(order=torch.zeros(4, dtype=torch.int32)[::2])
    },
}

LAYER_NORM = {
    "x must be a floating-point tensor, got torch.int32": {"x": X.int()},
    "x must have shape (B, T, 4), got (2, 3, 5)": {"x": torch.zeros(2, 3, 5)},
    "x must have shape (B, T, 4), got (2, 0, 4)": {"x": torch.zeros(2, 0, 4)},
    "weight must have shape (E, D), got (4,)": {"weight": GAIN[0]},
    "weight must be a tensor, got NoneType": {"weight": None},
    "weight must have the dtype of x, torch.float16, got torch.float32": {"x": X.half()},
    "weight must be on the device of x, cpu, got meta": {"weight": GAIN.to("meta")},
    "bias must have shape (2, 4), got (3, 4)": {"bias": torch.zeros(3, 4)},
    "bias must have the dtype of x, torch.float32, got torch.float64": {"bias": GAIN.double()},
    "bias must be on the device of x, cpu, got meta": {"bias": GAIN.to("meta")},
    "eps must be at least 0, got -1e-06": {"eps": -1e-6},
    "eps must be at least 0, got nan": {"eps": float("nan")},
    "routing must be a Routing, got tuple": {"routing": tuple(ROUTING)},
    "routing.expert must have shape (2,), got (1,)": {"routing": Routing.single(1)},
    "routing must be over the weight's 2 experts, got 1": {"routing": Routing.single(2)},
}

LINEAR_ROUTER = RouterWeights(
    torch.ones(4), torch.zeros(4), None, None, torch.zeros(2, 4), torch.zeros(2)
)
MLP_ROUTER = LINEAR_ROUTER._replace(
    hidden_weight=torch.zeros(5, 4), hidden_bias=torch.zeros(5), weight=torch.zeros(2, 5)
)
TILES = {"image_of_tile": torch.tensor([0, 0, 1]), "base_tile": torch.tensor([0, 2])}
TILES["x"] = torch.zeros(3, 2, 4)
THREE = {"x": torch.zeros(3, 2, 4)}
ROUTE = {
    "x must be a floating-point tensor, got torch.uint8": {"x": X.byte()},
    "x must have shape (B, T, 4), got (2, 3, 5)": {"x": torch.zeros(2, 3, 5)},
    "x must have shape (B, T, 4), got (2, 4)": {"x": torch.zeros(2, 4)},
    "norm_weight must have shape (D,), got ()": {
        "weights": LINEAR_ROUTER._replace(norm_weight=torch.tensor(1.0))
    },
    "norm_bias must have shape (4,), got (5,)": {
        "weights": LINEAR_ROUTER._replace(norm_bias=torch.zeros(5))
    },
    "hidden_bias must be given exactly when hidden_weight is, got NoneType": {
        "weights": MLP_ROUTER._replace(hidden_bias=None)
    },
    "hidden_weight must have shape (h, 4), got (5, 3)": {
        "weights": MLP_ROUTER._replace(hidden_weight=torch.zeros(5, 3))
    },
    "hidden_bias must have shape (5,), got (4,)": {
        "weights": MLP_ROUTER._replace(hidden_bias=torch.zeros(4))
    },
    "weight must have shape (E, 5), got (2, 4)": {
        "weights": MLP_ROUTER._replace(weight=LINEAR_ROUTER.weight)
    },
    "bias must have shape (2,), got (3,)": {"weights": LINEAR_ROUTER._replace(bias=torch.zeros(3))},
    "bias must be a floating-point tensor, got torch.int64": {
        "weights": LINEAR_ROUTER._replace(bias=torch.zeros(2).long())
    },
    "weight must be on the device of x, cpu, got meta": {
        "weights": LINEAR_ROUTER._replace(weight=LINEAR_ROUTER.weight.to("meta"))
    },
    "base_tile must be given exactly when image_of_tile is, got NoneType": THREE
    | {"image_of_tile": TILES["image_of_tile"]},
    "image_of_tile must have shape (3,), got (2,)": TILES | {"image_of_tile": torch.tensor([0, 1])},
    "image_of_tile must lie in 0..1, got -1": TILES | {"image_of_tile": torch.tensor([0, -1, 1])},
    "image_of_tile must lie in 0..1, got 2": TILES | {"image_of_tile": torch.tensor([0, 1, 2])},
    "image_of_tile must have dtype int32 or int64, got torch.float32": TILES
    | {"image_of_tile": torch.zeros(3)},
    "base_tile must lie in 0..2, got 3": TILES | {"base_tile": torch.tensor([0, 3])},
    "base_tile must have dtype int32 or int64, got torch.bool": TILES
    | {"base_tile": torch.zeros(2).bool()},
    "expert must have shape (3,), got (2,)": THREE | {"expert": torch.tensor([0, 1])},
    "expert must lie in 0..1, got 2": THREE | {"expert": torch.tensor([0, 1, 2])},
    "expert must have dtype int32 or int64, got torch.float32": THREE | {"expert": torch.zeros(3)},
    "expert must be on the device of x, cpu, got meta": THREE
    | {"expert": torch.zeros(3, dtype=torch.int64, device="meta")},
    "strategy must be a Strategy, got direct": {"strategy": "direct"},
    "eps must be at least 0, got -1.0": {"eps": -1.0},
}

ROUTE_LINEAR = {
    "router must be a RouterWeights, got Tensor": {"router": X},
    "router must score the weight's 2 experts, got 3": {
        "router": LINEAR_ROUTER._replace(weight=torch.zeros(3, 4), bias=torch.zeros(3))
    },
    "router_eps must be at least 0, got -1.0": {"router_eps": -1.0},
    "strategy must be a Strategy, got direct": {"strategy": "direct"},
    "x must have shape (B, T, 5), got (2, 3, 4)": {"weight": torch.zeros(2, 5, 5)},
    "norm_weight must have shape (2, 4), got (2, 3)": {"norm_weight": torch.zeros(2, 3)},
    "norm_weight must have the dtype of x, torch.float32, got torch.float64": {
        "norm_weight": GAIN.double()
    },
    "norm_bias must have shape (2, 4), got (4,)": {"norm_bias": GAIN[0]},
    "norm_eps must be at least 0, got nan": {"norm_eps": NAN},
    "weight must hold at least one tensor, got an empty sequence": {"weight": []},
    "weight must be a tensor, got NoneType": {"weight": None},
    "bias must match weight in number, got 2": {"bias": [BIAS, BIAS]},
    f"activation must be one of {ACTIVATIONS}, got silu": {"activation": "silu"},
}

NORM_LINEAR = {
    key: changed
    for key, changed in ROUTE_LINEAR.items()
    if key.startswith(("x ", "norm", "weight", "bias", "activation"))
} | {
    "x must be a floating-point tensor, got torch.int64": {"x": X.long()},
    "norm_eps must be at least 0, got -1.0": {"norm_eps": -1.0},
    "routing must be a Routing, got Tensor": {"routing": ROUTING.expert},
    "routing must be over the weight's 2 experts, got 3": {
        "routing": Routing.forced(ROUTING.expert, 3)
    },
}

GOOD = {
    "grouped_linear": {"x": X, "weight": W, "bias": BIAS, "routing": ROUTING},
    "grouped_layer_norm": {"x": X, "weight": GAIN, "bias": None, "routing": ROUTING},
    "route": {"x": X, "weights": LINEAR_ROUTER, "strategy": Strategy()},
    "route_grouped_linear": {"x": X, "router": LINEAR_ROUTER, "strategy": Strategy()}
    | {"norm_weight": GAIN, "norm_bias": None, "weight": W, "bias": BIAS},
    "norm_grouped_linear": {"x": X, "norm_weight": GAIN, "norm_bias": None}
    | {"weight": W, "bias": BIAS, "routing": ROUTING},
}
CASES = {
    f"{op}: {message}": changed
    for op, table in (
        ("grouped_linear", LINEAR),
        ("grouped_layer_norm", LAYER_NORM),
        ("route", ROUTE),
        ("route_grouped_linear", ROUTE_LINEAR),
        ("norm_grouped_linear", NORM_LINEAR),
    )
    for message, changed in table.items()
}


@pytest.mark.parametrize("op", GOOD)
def test_the_good_arguments_are_good(op):
    getattr(ops, op)(**GOOD[op])


@pytest.mark.parametrize("message", CASES)
def test_bad_input_is_named_before_any_work(message, monkeypatch):
    op = message.split(":")[0]
    module = importlib.import_module(f"mixpert_kernels.ops.{op}")
    monkeypatch.setattr(module, "pick", lambda *_, **__: pytest.fail("work began"))
    with pytest.raises(ValueError) as error:
        getattr(ops, op)(**GOOD[op] | CASES[message])
    assert str(error.value) == message.rstrip()


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"name": "best"},
            "strategy must be one of ('direct', 'score_threshold', 'score_difference'), got best",
        ),
        ({"against": "x"}, "against must be one of ('runner_up', 'versatile'), got x"),
        ({"tau": 1.5}, "tau must lie in [0, 1], got 1.5"),
        ({"tau": NAN}, "tau must lie in [0, 1], got nan"),
        ({"delta": -0.1}, "delta must lie in [0, 1], got -0.1"),
    ],
)
def test_a_bad_strategy_is_named(options, message):
    with pytest.raises(ValueError) as error:
        Strategy(**options)
    assert str(error.value) == f"route: {message}"
