"""A mixpertized vision-language model, against the model it was made from and against its experts one by one."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from _mllms import EXPERTS, KINDS, LAYERS, Kind, Prompts
from torch import Tensor, nn

from mixpert_kernels.hf.mllm import forced_routing, mixpertize, record_routing, unmixpertize
from mixpert_kernels.hf.mllm.families import FAMILIES
from mixpert_kernels.modules.grouped import GroupedLinear
from mixpert_kernels.testing import randomize_

CALL = ("pixel_values", "image_sizes", "image_grid_thw")  # what get_image_features takes
families = pytest.mark.parametrize("family", KINDS)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


@torch.no_grad()
def mixed(
    kind: Kind, distinct: bool = False, model: nn.Module | None = None, **options: object
) -> nn.Module:
    """A mixpertized model, ``model`` or a new one; ``distinct``: no two experts agree."""
    model = kind.build() if model is None else model
    mixpertize(model, EXPERTS, **{"routing": "direct", **options})
    for parameter in model.base_model.mixpert_router.parameters():  # decided, and not all one way
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    if distinct:
        for i, module in enumerate(expert_modules(model)):
            randomize_(module, seed=i)
    return model


def expert_modules(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if hasattr(m, "mixpert_template")]


def projected(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """What the projector gives for each tile, (T, P)."""
    family, outputs = FAMILIES[model.config.model_type], []
    projector = model.base_model.get_submodule(family.projector)
    handle = projector.register_forward_hook(lambda module, args, output: outputs.append(output))
    model(**inputs)
    handle.remove()
    if not family.packed:
        return list(outputs[0])
    return list(outputs[0].split((inputs["image_grid_thw"].prod(-1) // 4).tolist()))


def by_image(prompts: Prompts) -> list[int]:
    """The image each tile is of."""
    counts = [n for prompt in prompts for n in prompt]
    return [image for image, n in enumerate(counts) for _ in range(n)]


def assert_close(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape
    assert float((got - wanted).abs().max() / wanted.abs().max()) < 1e-5


@families
def test_untrained_experts_give_the_models_own_logits(family):
    kind = KINDS[family]
    plain, model = kind.build(), mixed(kind)
    for prompts in kind.prompts.values():
        inputs, images = kind.call(prompts), sum(map(len, prompts))
        wanted = plain(**inputs).logits
        assert_close(model(**inputs).logits, wanted)
        routes = [*range(EXPERTS), torch.arange(images) % EXPERTS]
        for expert in routes:
            with forced_routing(model, expert):
                assert_close(model(**inputs).logits, wanted)


@families
def test_images_count_in_the_logits(family):
    """Else the test above would show nothing."""
    kind = KINDS[family]
    model, prompts = mixed(kind), kind.prompts["batch"]
    logits = [model(**{**kind.call(prompts), **pixels(kind, prompts, i)}).logits for i in (0, 1)]
    changed = (logits[0] - logits[1]).abs().amax((1, 2)) > 1e-3
    assert changed.tolist() == [len(prompt) > 0 for prompt in prompts]


def pixels(kind: Kind, prompts: Prompts, seed: int) -> dict[str, Tensor]:
    return {"pixel_values": kind.call(prompts, seed)["pixel_values"]}


@families
def test_generate_gives_the_same_tokens(family):
    kind = KINDS[family]
    plain, model = kind.build(), mixed(kind)
    for prompts in kind.prompts.values():
        inputs = kind.call(prompts)
        options = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(model.generate(**inputs, **options), plain.generate(**inputs, **options))


@families
def test_only_the_images_of_a_changed_expert_change(family):
    kind = KINDS[family]
    model, prompts = mixed(kind, distinct=True), kind.prompts["batch"]
    inputs, image = kind.call(prompts), by_image(prompts)
    routes = torch.arange(max(image) + 1) % EXPERTS  # of each image
    with forced_routing(model, routes):
        before = projected(model, inputs)
        parameters = [p for part in expert_modules(model) for p in part.parameters()]
        for i, parameter in enumerate(parameters):
            expert = i % EXPERTS
            kept = parameter[expert].clone()
            parameter[expert] += 0.5
            after = projected(model, inputs)
            changed = torch.tensor(
                [bool((a != b).any()) for a, b in zip(after, before, strict=True)]
            )
            parameter[expert] = kept
            wanted = torch.tensor([int(routes[i]) == expert for i in image])
            assert not (changed & ~wanted).any()
            if parameter.ndim > 2:  # the bias of the keys cancels in the softmax, but for roundings
                assert torch.equal(changed, wanted)


@families
def test_each_image_has_the_features_of_its_expert_alone(family):
    kind = KINDS[family]
    model, prompts = mixed(kind, distinct=True), kind.prompts["batch"]
    inputs, image = kind.call(prompts), by_image(prompts)
    alone = [unmixpertize(copy.deepcopy(model), expert) for expert in range(EXPERTS)]
    features = [projected(plain, inputs) for plain in alone]
    routes = torch.arange(max(image) + 1).flip(0) % EXPERTS
    with forced_routing(model, routes):
        got = projected(model, inputs)
    with record_routing(model) as records:
        routed = projected(model, inputs)
    for tile, i in enumerate(image):
        assert_close(got[tile], features[routes[i]][tile])
        assert_close(routed[tile], features[records[0].expert[i]][tile])


@families
def test_unmixpertize_undoes_it(family):
    kind = KINDS[family]
    plain, model = kind.build(), mixed(kind)
    assert unmixpertize(model, 2) is model
    assert type(model) is type(plain)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert model.config.to_dict() == plain.config.to_dict()
    wanted = plain.state_dict()
    assert list(model.state_dict()) == list(wanted)
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    inputs = kind.call(kind.prompts["batch"])
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)


@families
def test_names_stay(family):
    kind = KINDS[family]
    plain, model = kind.build(), mixed(kind)
    new = {n for n, _ in model.named_parameters()} - {n for n, _ in plain.named_parameters()}
    assert new and all(name.startswith("model.mixpert_router.") for name in new)
    assert {n for n, _ in plain.named_parameters()} <= {n for n, _ in model.named_parameters()}
    for path, module in plain.named_modules():
        if not isinstance(model.get_submodule(path), GroupedLinear):
            got = type(model.get_submodule(path)).__name__.replace("Grouped", "")
            assert got in type(module).__name__, path
    assert isinstance(model, type(plain)) and model.config.model_type == plain.config.model_type


@families
def test_every_hidden_state_of_the_tower_can_be_had(family):
    kind = KINDS[family]
    plain, model = kind.build(), mixed(kind)
    inputs = kind.call(kind.prompts["one image"])
    call = {name: inputs[name] for name in inputs if name in CALL}
    states = []
    for one in (plain, model):
        with forced_routing(model, 1, image_of_tile=[0] * kind.many):
            states.append(one.get_image_features(**call, output_hidden_states=True).hidden_states)
    assert len(states[0]) == len(states[1]) == LAYERS + 1
    for wanted, got in zip(*states, strict=True):
        assert_close(got, wanted)


@families
@torch.enable_grad()
def test_gradient_checkpointing_gives_the_same_gradients(family):
    kind = KINDS[family]
    gradients = []
    for reentrant in (None, False, True):
        model = mixed(kind, distinct=True).train()
        prompts = kind.prompts["batch"]
        inputs = kind.call(prompts)
        if reentrant is not None:
            options = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            model.enable_input_require_grads()
        routes = torch.arange(sum(map(len, prompts))) % EXPERTS
        with forced_routing(model, routes):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
        with forced_routing(model, 0):  # another forward before the backward
            model(**inputs)
        loss.backward()
        experts = [p for m in expert_modules(model) for p in m.parameters()]
        gradients.append([p.grad for p in experts])
    largest = max(float(g.abs().max()) for g in gradients[0])
    assert largest > 0
    for again in gradients[1:]:  # sums over several feature layers may be in another order
        torch.testing.assert_close(again, gradients[0], rtol=1e-5, atol=1e-6 * largest)


@families
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prefill_chunk_size": 7}], ids=str)
def test_generate_routes_once(family, options):
    kind = KINDS[family]
    plain, model = kind.build(), mixed(kind)
    prompts = kind.prompts["batch"]
    options = {**options, "max_new_tokens": 3, "do_sample": False}
    inputs = kind.call(prompts)
    wanted = plain.generate(**inputs, **options)
    with record_routing(model) as records:
        got = model.generate(**inputs, **options, return_dict_in_generate=True)
    assert torch.equal(got.sequences, wanted)
    assert len(records) == len(got.router) == 1
    assert records[0].expert.shape == (sum(map(len, prompts)),)


@families
@torch.enable_grad()
def test_an_expert_gets_the_gradients_of_the_plain_model(family):
    kind = KINDS[family]
    model = mixed(kind, distinct=True)
    plain = unmixpertize(copy.deepcopy(model), 1)
    inputs = kind.call(kind.prompts["batch"])
    plain(**inputs, labels=inputs["input_ids"]).loss.backward()
    with forced_routing(model, 1), record_routing(model) as records:
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        (loss - records[0].scores[:, 0].log().mean()).backward()
    wanted = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    largest = max(float(g.abs().max()) for g in wanted.values())
    grouped = {id(p) for m in expert_modules(model) for p in m.parameters()}
    for name, p in model.named_parameters():
        if "mixpert_router" in name:
            assert p.grad.abs().max() > 0
        elif id(p) in grouped:
            assert not p.grad[[0, 2]].any()
            torch.testing.assert_close(p.grad[1], wanted[name], rtol=1e-4, atol=1e-6 * largest)
        elif "language_model" in name or "text_model" in name:
            torch.testing.assert_close(p.grad, wanted[name], rtol=1e-4, atol=1e-6 * largest)
