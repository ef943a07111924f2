"""fit_router and calibrate."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from _towers import EXPERTS, WIDTH, assert_close, make, pixels, refused, tell_apart

from mixpert_kernels.training import calibrate, fit_router


def clusters(
    each: int = 12, spread: float = 0.3, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (N, D) around one centre an expert, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(EXPERTS, WIDTH, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(EXPERTS).repeat(each)
    noise = torch.randn(len(labels), WIDTH, generator=generator)
    return centres[labels] + spread * noise, labels


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


# fit_router


@pytest.mark.parametrize("hidden", [None, 8])
def test_a_separable_problem_is_learnt(hidden: int | None) -> None:
    tower = make("siglip", router_hidden=hidden)
    features, labels = clusters()
    untrained = float((tower.router(features).argmax(-1) == labels).float().mean())
    accuracy = fit_router(tower, features, labels, steps=150, lr=1e-2)
    assert untrained < 0.8
    assert accuracy == 1.0
    fresh, wanted = clusters(seed=5)
    with torch.no_grad():
        assert (tower.router(fresh).argmax(-1) == wanted).float().mean() > 0.95


def test_accuracy_is_that_of_the_trained_router() -> None:
    tower = make("siglip")
    features, labels = clusters(spread=3.0)
    accuracy = fit_router(tower, features, labels, steps=5)
    with torch.no_grad():
        right = tower.router(features).argmax(-1) == labels
    assert accuracy == float(right.float().mean())
    assert 0 < accuracy < 1


def test_images_of_labelled_domains_are_routed_as_they_were_labelled() -> None:
    tower = make("siglip")
    images = pixels(9, (30, 30)) + torch.arange(9).remainder(3).sub(1)[:, None, None, None] * 2.0
    labels = torch.arange(9).remainder(3)
    with torch.no_grad():
        features = tower.router_features(images)
    assert fit_router(tower, features, labels, steps=200, lr=1e-2) == 1.0
    with torch.no_grad():
        assert tower(images).expert.tolist() == labels.tolist()


def test_the_seed_decides_everything() -> None:
    features, labels = clusters()
    states = []
    for seed, noise in ((3, 1), (3, 2), (4, 1)):
        tower = tell_apart(make("siglip"), noise)  # whatever the router was before
        torch.manual_seed(noise)
        fit_router(tower, features, labels, steps=10, seed=seed)
        states.append(state(tower.router))
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not torch.equal(states[0]["out.weight"], states[2]["out.weight"])


def test_the_global_generator_is_left_alone() -> None:
    features, labels = clusters()
    torch.manual_seed(1)
    want = torch.rand(3)
    torch.manual_seed(1)
    fit_router(make("siglip"), features, labels, steps=2)
    torch.manual_seed(1)
    fit = make("siglip")
    torch.manual_seed(1)
    fit_router(fit, features, labels, steps=2)
    assert torch.equal(torch.rand(3), want)


def test_nothing_but_the_router_is_touched() -> None:
    tower = make("siglip")
    features, labels = clusters()
    kept = {name: value for name, value in state(tower).items() if not name.startswith("router.")}
    flags = {name: parameter.requires_grad for name, parameter in tower.named_parameters()}
    fit_router(tower, features, labels, steps=3)
    now = tower.state_dict()
    assert all(torch.equal(now[name], value) for name, value in kept.items())
    assert all(parameter.grad is None for parameter in tower.parameters())
    assert {name: p.requires_grad for name, p in tower.named_parameters()} == flags
    assert not tower.training


def test_features_with_a_graph_train_no_trunk() -> None:
    tower = make("siglip")
    features = tower.router_features(pixels(6, (30, 30)))
    assert features.requires_grad
    fit_router(tower, features, torch.arange(6).remainder(3), steps=3)
    assert all(parameter.grad is None for parameter in tower.parameters())


def test_features_of_inference_mode_serve_and_grad_mode_does_not_matter() -> None:
    features, labels = clusters()
    want = make("siglip")
    fit_router(want, features, labels, steps=5)
    with torch.inference_mode():
        cached = features * 1.0
    tower = make("siglip")
    fit_router(tower, cached, labels, steps=5)
    assert_close(tower.router.out.weight.detach(), want.router.out.weight.detach())
    with torch.no_grad():
        tower = make("siglip")
        fit_router(tower, features, labels, steps=5)
    assert_close(tower.router.out.weight.detach(), want.router.out.weight.detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_towers_of_other_dtypes_learn_too(dtype: torch.dtype) -> None:
    tower = make("siglip").to(dtype)
    features, labels = clusters()
    assert fit_router(tower, features, labels, steps=150, lr=1e-2) >= 0.95
    assert all(p.isfinite().all() and p.dtype == dtype for p in tower.router.parameters())


def test_a_frozen_tower_can_have_its_router_trained() -> None:
    tower = make("siglip").requires_grad_(False)
    features, labels = clusters()
    assert fit_router(tower, features, labels, steps=150, lr=1e-2) == 1.0
    assert not any(parameter.requires_grad for parameter in tower.parameters())


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_of_any_integer_type(dtype: torch.dtype) -> None:
    features, labels = clusters()
    tower = make("siglip")
    assert fit_router(tower, features, labels.to(dtype), steps=150, lr=1e-2) == 1.0
    calibrate(make("siglip", routing="score_difference"), features, labels.to(dtype))


FEATURES, LABELS = clusters()
BAD = {
    "rank": ((FEATURES[0], LABELS), ("features must", f"(N, {WIDTH})", f"({WIDTH},)")),
    "none": ((FEATURES[:0], LABELS[:0]), ("features must", "(0,")),
    "width": ((FEATURES[:, :5], LABELS), ("features must", str(WIDTH), "5")),
    "too few labels": ((FEATURES, LABELS[1:]), ("labels must", "36", "(35,)")),
    "float labels": ((FEATURES, LABELS.float()), ("labels must", "integers", "float32")),
    "label too large": ((FEATURES, LABELS + 1), ("labels must", "0..2", "got 3")),
    "label negative": ((FEATURES, LABELS - 1), ("labels must", "0..2", "got -1")),
    "labels a list": ((FEATURES, LABELS.tolist()), ("labels must", "list")),
    "not finite": ((FEATURES / 0, LABELS), ("features must", "finite")),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_of_fit_router(case: str) -> None:
    arguments, words = BAD[case]
    tower = make("siglip")
    before = state(tower.router)
    refused(lambda: fit_router(tower, *arguments), "fit_router", *words)
    assert all(
        torch.equal(value, before[name]) for name, value in tower.router.state_dict().items()
    )


@pytest.mark.parametrize("case", BAD)
def test_bad_input_of_calibrate(case: str) -> None:
    arguments, words = BAD[case]
    tower = make("siglip", routing="score_difference", delta=0.5)
    refused(lambda: tower.calibrate(*arguments), "calibrate", *words)
    assert tower.config.delta == 0.5


# calibrate


def trained(routing: str = "score_difference", spread: float = 4.0, **options: object):
    """A tower whose router is right most of the time, and the data it is calibrated on."""
    tower = make("siglip", routing=routing, **options)
    fit_router(tower, *clusters(spread=0.8), steps=60, lr=1e-2)
    return tower, *clusters(60, spread, seed=8)


def by_hand(tower, features, labels, threshold: float) -> tuple[float, float, float]:
    """Accuracy, fallback and errors, image by image."""
    with torch.no_grad():
        scores = tower.router(features).softmax(-1)
    right = fallback = wrong = 0
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        best = row.index(max(row))
        others = [s for e, s in enumerate(row) if e != best]
        reference = row[0] if tower.config.against == "versatile" else max(others)
        margin = max(row) if tower.config.routing == "score_threshold" else max(row) - reference
        expert = best if margin >= threshold else 0
        right += expert == label
        fallback += expert == 0 and best != 0
        wrong += expert not in (0, label)
    return right / len(labels), fallback / len(labels), wrong / len(labels)


@pytest.mark.parametrize("routing", ["score_threshold", "score_difference"])
@pytest.mark.parametrize("against", ["runner_up", "versatile"])
@pytest.mark.parametrize("max_errors", [0.0, 0.05, 0.15, 1.0])
def test_the_smallest_threshold_that_keeps_the_errors_down(routing, against, max_errors) -> None:
    tower, features, labels = trained(routing, against=against)
    found = tower.calibrate(features, labels, max_errors=max_errors)
    name = "tau" if routing == "score_threshold" else "delta"
    assert getattr(tower.config, name) == found.strategy.threshold == found.chosen.threshold
    assert tower.config.strategy == found.strategy
    good = [point for point in found.curve if point.errors <= max_errors]
    if good:
        assert found.chosen == good[0]
        assert found.chosen.errors <= max_errors
    else:
        assert found.chosen.errors == min(point.errors for point in found.curve)
    for point in found.curve[::10]:
        want = by_hand(tower, features, labels, point.threshold)
        got = (point.accuracy, point.fallback, point.errors)
        assert got == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("routing", ["score_threshold", "score_difference"])
def test_the_curve_is_monotone(routing: str) -> None:
    tower, features, labels = trained(routing)
    curve = tower.calibrate(features, labels).curve
    assert [point.threshold for point in curve] == pytest.approx([i / 100 for i in range(101)])
    for before, after in itertools.pairwise(curve):
        assert after.fallback >= before.fallback
        assert after.errors <= before.errors
    assert curve[0].fallback == 0
    assert curve[0].errors > 0.15
    assert curve[-1].fallback > curve[0].fallback


def test_the_other_threshold_and_the_weights_stay() -> None:
    tower, features, labels = trained("score_threshold", delta=0.35)
    before = state(tower)
    tower.calibrate(features, labels)
    assert tower.config.delta == 0.35
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())
    assert all(parameter.grad is None for parameter in tower.parameters())


def test_a_loader_gives_what_its_features_give() -> None:
    tower = make("siglip", routing="score_difference")
    images, labels = pixels(7, (30, 30)), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    with torch.no_grad():
        features = tower.router_features(images)
    want = copy.deepcopy(tower).calibrate(features, labels)
    loader = [(images[:3], labels[:3]), (images[3:], labels[3:])]
    got = tower.calibrate(iter(loader))
    assert got.strategy == want.strategy
    assert got.curve == want.curve


def test_the_calibrated_threshold_is_what_the_tower_routes_by() -> None:
    tower = make("siglip", routing="score_difference")
    images, labels = pixels(8, (30, 30)), torch.tensor([1, 1, 2, 0, 1, 2, 0, 2])
    found = tower.calibrate([(images, labels)], max_errors=0.2)
    with torch.no_grad():
        routes = tower(images).expert
    assert float((routes == labels).float().mean()) == pytest.approx(found.chosen.accuracy)
    wrong = (routes != labels) & (routes != 0)
    assert float(wrong.float().mean()) == pytest.approx(found.chosen.errors)


def test_calibrate_refuses_what_it_cannot_do() -> None:
    features, labels = clusters()
    tower = make("siglip", routing="score_difference")
    refused(lambda: make("siglip").calibrate(features, labels), "calibrate", "routing", "direct")
    for wrong in (-0.1, 1.1, float("nan")):
        refused(
            lambda wrong=wrong: tower.calibrate(features, labels, max_errors=wrong),
            "calibrate: max_errors must",
            "[0, 1]",
            str(wrong),
        )
    refused(lambda: tower.calibrate(features), "calibrate: labels must", "None")
    refused(lambda: tower.calibrate([], None), "calibrate: data must", "none")
    batches = [(pixels(1, (30, 30)), torch.tensor([0]))]
    refused(lambda: tower.calibrate(batches, torch.tensor([0])), "calibrate: labels must be None")
    batches = [(pixels(2, (30, 30)), torch.tensor([0]))]
    refused(lambda: tower.calibrate(batches), "calibrate: labels must", "2")
