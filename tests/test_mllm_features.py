"""router_features, and fit_router on them: the router of a mixpertized model learns labels, and nothing else moves."""

from __future__ import annotations

import pytest
import torch
from _mllms import EXPERTS, KINDS
from _towers import refused
from test_mllm_parity import mixed

from mixpert_kernels.hf.mllm import forced_routing, record_routing, router_features
from mixpert_kernels.training import fit_router

families = pytest.mark.parametrize("family", KINDS)


@families
@torch.no_grad()
def test_the_router_scores_an_images_features_as_the_model_does(family):
    kind = KINDS[family]
    model = mixed(kind)
    for prompts in kind.prompts.values():
        images = sum(map(len, prompts))
        if not images:
            continue
        inputs = kind.call(prompts)
        with record_routing(model) as records:
            model(**inputs)
        features = router_features(model, **inputs)
        assert features.shape == (images, 16) and features.dtype == torch.float32
        scores = model.base_model.mixpert_router(features).softmax(-1)
        torch.testing.assert_close(scores, records[0].scores)


@families
def test_fit_router_routes_images_as_they_are_labelled(family):
    kind = KINDS[family]
    model = mixed(kind)
    prompts = [[kind.many], [kind.few], [kind.many]]
    inputs = kind.call(prompts)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    features = router_features(model, **inputs)
    assert not features.requires_grad
    for labels in ([0, 2, 1], [1, 0, 2]):
        accuracy = fit_router(model, features, torch.tensor(labels), steps=100, lr=0.1)
        assert accuracy == 1
        with record_routing(model) as records:
            model(**inputs)
        assert records[0].expert.tolist() == labels
    after = model.state_dict()
    changed = [name for name, value in before.items() if not torch.equal(after[name], value)]
    assert changed and all(".mixpert_router." in name for name in changed)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_features_are_of_the_models_own_dtype_and_boundaries_from_outside():
    kind = KINDS["gemma3"]
    model = mixed(kind).to(torch.bfloat16)
    inputs = kind.call([[1], [1], [1]])
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    every = router_features(model, **inputs)
    assert every.dtype == torch.float32
    with forced_routing(model, image_of_tile=[0, 1, 1], base_tile=[0, 2]):
        assert torch.equal(router_features(model, **inputs), every[[0, 2]])


def test_a_model_inside_another_is_trained_too():
    kind = KINDS["llava"]
    model = mixed(kind)
    inputs = kind.call([[1], [1]])
    inside = torch.nn.ModuleDict({"model": model})
    features = router_features(inside, **inputs)
    assert torch.equal(features, router_features(model, **inputs))
    for labels in ([0, 2], [2, 1]):
        fit_router(inside, features, torch.tensor(labels), steps=100, lr=0.1)
        with record_routing(inside) as records:
            model(**inputs)
        assert records[0].expert.tolist() == labels


def test_what_is_refused():
    kind = KINDS["llava"]
    inputs = kind.call([[1]])
    plain = kind.build()
    refused(lambda: router_features(plain, **inputs), "router_features", "plain Llava")
    model = mixed(kind)
    text = kind.call([[]])
    refused(lambda: router_features(model, **text), "pixel_values", "got input_ids, attention_mask")
    refused(lambda: router_features(model), "pixel_values", "got none")
    features = router_features(model, **inputs)
    label = torch.tensor([0])
    refused(lambda: fit_router(plain, features, label), "fit_router: tower must", "plain Llava")
    refused(lambda: fit_router(model, features[:, 1:], label), "features must", "(N, 16)")
    refused(lambda: fit_router(model, features, label + EXPERTS), "labels must", "got 3")
    internvl = KINDS["internvl"]
    pixels = internvl.call([[1]])["pixel_values"]
    refused(lambda: router_features(mixed(internvl), pixel_values=pixels), "input_ids")
