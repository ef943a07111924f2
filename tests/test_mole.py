"""MixtureOfLanguageExperts against all adapters by nn.Linear, mixed straight-through, as the original computes them."""

from __future__ import annotations

import copy
import importlib
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mixpert_kernels.modules import Instruction, MixtureOfLanguageExperts
from mixpert_kernels.modules.mole import stack_adapters, unstack_adapters
from mixpert_kernels.testing import assert_as_accurate, randomize_

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTH, HIDDEN, SENTENCE, EXPERTS, TOKENS = 24, 8, 16, 4, 5


class Adapter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj, self.up_proj = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.up_proj(self.down_proj(x).relu()) * self.scale


class Adapters(nn.Module):
    """Every adapter on every sample; G is one-hot, with the softmax's gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(Adapter() for _ in range(EXPERTS))
        self.router_mlp = nn.Sequential(
            nn.Linear(SENTENCE, SENTENCE), nn.GELU(), nn.Linear(SENTENCE, EXPERTS)
        )

    def forward(self, x, sentence, beams=1):
        p = self.router_mlp(sentence).softmax(-1).repeat_interleave(beams, 0)
        gate = F.one_hot(p.argmax(-1), EXPERTS) - p.detach() + p
        return sum(gate[:, k, None, None] * a(x) for k, a in enumerate(self.adapters))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ffn, self.adapter = ffn(), Adapters()

    def forward(self, x, sentence, beams=1):
        return self.ffn(x) + self.adapter(x, sentence, beams)


class Pair(nn.Module):
    def forward(self, x):
        return x, x


def ffn():
    return nn.Sequential(nn.Linear(WIDTH, 3 * WIDTH), nn.SiLU(), nn.Linear(3 * WIDTH, WIDTH))


def mole(experts=EXPERTS, **options):
    return MixtureOfLanguageExperts(
        options.pop("ffn", None) or ffn(),
        WIDTH,
        experts=experts,
        hidden=HIDDEN,
        sentence_width=SENTENCE,
        instruction=Instruction(),
        **options,
    )


@pytest.fixture
def pair():
    """The dense module and ours, of the same parameters; sentences that choose adapters 3, 0, 3 and 1."""
    dense, ours = randomize_(Dense()), mole()
    with torch.no_grad():
        for layer in dense.adapter.router_mlp[::2]:
            layer.weight *= 3
    ours.load_state_dict(ours_of(dense))
    sentences = torch.randn(64, SENTENCE, generator=torch.Generator().manual_seed(1))
    chosen = ours.probabilities(sentences).argmax(1).tolist()
    return dense, ours, sentences[[chosen.index(e) for e in (3, 0, 3, 1)]]


def ours_of(dense):
    """The dense module's state under our names."""
    below = {n.removeprefix("adapter."): p for n, p in dense.state_dict().items()}
    ffns = {n: below.pop(n) for n in list(below) if n.startswith("ffn.")}
    return ffns | stack_adapters(below)


def tokens(rows, dtype=None):
    return torch.randn(rows, TOKENS, WIDTH, generator=torch.Generator().manual_seed(2), dtype=dtype)


@pytest.mark.parametrize("beams", [1, 3])
def test_result_and_every_gradient_are_those_of_all_adapters(pair, beams):
    dense, ours, sentences = pair
    dy = tokens(4 * beams).flip(1)

    def gradients(module, call, dtype):
        module = copy.deepcopy(module).to(dtype)
        x = (tokens(4 * beams) * 2).to(dtype).requires_grad_()
        y = call(module, x, sentences.to(dtype))
        (y * dy.to(dtype)).sum().backward()
        grads = {name: p.grad for name, p in module.named_parameters()}
        if isinstance(module, Dense):
            module.load_state_dict(grads)
            grads = ours_of(module)
        return {"y": y.detach(), "x": x.grad} | grads

    def ours_on(module, x, s):
        with module.instruction.given(s):
            return module(x)

    def dense_on(module, x, s):
        return module(x, s, beams)

    got = gradients(ours, ours_on, torch.float32)
    plain, truth = (gradients(dense, dense_on, dtype) for dtype in (torch.float32, torch.float64))
    assert got.keys() == plain.keys()
    for name in got:
        assert_as_accurate(name, got[name], plain[name], truth[name])
    assert got["down"][2].count_nonzero() == got["up"][2].count_nonzero() == 0  # none chose it
    assert got["router.0.weight"].count_nonzero() and got["scale"].count_nonzero() == 3


def counted(monkeypatch):
    """Operations inside the op, forward and backward, which a counter around it does not see."""
    contract = importlib.import_module("mixpert_kernels.ops.grouped_adapter")
    pick, counts = contract._pick, {}

    def counting(*args):
        backend = pick(*args)

        class Counting:
            def __getattr__(self, name):
                def run(*given):
                    with FlopCounterMode(display=False) as counter:
                        result = getattr(backend, name)(*given)
                    counts[name] = counts.get(name, 0) + counter.get_total_flops()
                    return result

                return run

        return Counting()

    monkeypatch.setattr(contract, "_pick", counting)
    return counts


def test_inference_computes_one_adapter_of_k_and_the_router_once_a_request(pair, monkeypatch):
    dense, ours, sentences = pair
    x = tokens(4)
    counts = counted(monkeypatch)
    ours.instruction.set(sentences)
    with torch.no_grad(), FlopCounterMode(display=False) as outside:
        for _ in range(3):
            ours(x)
    with torch.no_grad(), FlopCounterMode(display=False) as ffn_alone:
        ours.ffn(x)
    with torch.no_grad(), FlopCounterMode(display=False) as adapters:
        sum(a(x) for a in dense.adapter.adapters)
    with torch.no_grad(), FlopCounterMode(display=False) as router:
        dense.adapter.router_mlp(sentences)
    assert counts == {"grouped_adapter": 3 * adapters.get_total_flops() // EXPERTS}
    assert outside.get_total_flops() == 3 * ffn_alone.get_total_flops() + router.get_total_flops()


@pytest.mark.parametrize("router", [True, False])
def test_all_adapters_are_looked_at_only_for_the_routers_gradient(pair, monkeypatch, router):
    _, ours, sentences = pair
    ours.router.requires_grad_(router)
    counts = counted(monkeypatch)
    with ours.instruction.given(sentences):
        ours(tokens(4)).sum().backward()
    forward, backward = counts["grouped_adapter"], counts["grouped_adapter_backward"]
    one = 4 * TOKENS * 2 * (2 * WIDTH * HIDDEN)
    assert forward == one
    asked = EXPERTS if router else 1  # else for the chosen one's scale
    assert backward <= 2 * one + asked * (
        one + 2 * 4 * WIDTH
    )  # hidden numbers, and what meets them


def test_fresh_experts_give_the_bits_of_the_ffn():
    for dtype in (torch.float32, torch.bfloat16):
        ours = mole(dtype=dtype, ffn=ffn().to(dtype))
        x = tokens(6).to(dtype)
        with ours.instruction.given(torch.randn(2, SENTENCE)):
            assert torch.equal(ours(x), ours.ffn(x))
        assert ours.up.count_nonzero() == ours.up_bias.count_nonzero() == 0
        assert torch.equal(ours.scale, torch.ones(EXPERTS, dtype=dtype))
        assert ours.down.std() > 0.5 * WIDTH**-0.5 / 3**0.5  # uniform within WIDTH ** -0.5


def test_a_request_is_routed_once_and_anew_when_anything_changed(pair):
    _, ours, sentences = pair
    calls = []
    ours.router.register_forward_hook(lambda *_: calls.append(1))
    x, own = tokens(4), sentences.clone()

    def routed(expected, change, rows=x, grad=False):
        with torch.no_grad():
            change()
        calls.clear()
        with torch.set_grad_enabled(grad):
            ours(rows)
        assert len(calls) == expected

    ours.instruction.set(own)
    routed(1, lambda: None)
    routed(0, lambda: None)
    routed(1, lambda: own.add_(1))
    routed(1, lambda: ours.router[0].weight.mul_(2))
    routed(1, lambda: setattr(ours.router[2].weight, "data", ours.router[2].weight.data * 2))
    routed(1, lambda: None, rows=tokens(8))
    routed(1, lambda: None, rows=tokens(8), grad=True)
    routed(1, lambda: ours.instruction.set(own), rows=tokens(8))
    assert ours.route(tokens(8))[0].expert.shape == (8,)
    with torch.inference_mode():
        loaded = copy.deepcopy(ours)  # whose parameters have no versions
        with loaded.instruction.given(own):
            assert torch.equal(loaded(x), loaded(x))


def test_threads_do_not_see_each_others_instructions(pair):
    _, ours, sentences = pair
    x, alone = tokens(1), {}
    for b in (0, 1):
        with torch.no_grad(), ours.instruction.given(sentences[b : b + 1]):
            alone[b] = ours(x)
    barrier, results = threading.Barrier(2), {}

    def serve(b):
        try:
            ours(x)
        except RuntimeError as error:
            results["unset"] = str(error)
        with torch.no_grad(), ours.instruction.given(sentences[b : b + 1]):
            for _ in range(5):
                barrier.wait(30)
                results[b] = ours(x)

    ours.instruction.set(sentences)  # of this thread
    threads = [threading.Thread(target=serve, args=(b,)) for b in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "no instruction is set in this thread" in results["unset"]
    assert not torch.equal(alone[0], alone[1])
    assert all(torch.equal(results[b], alone[b]) for b in (0, 1))
    assert ours.instruction.request.embedding is sentences


def test_recomputed_in_backward_it_sees_its_own_request(pair):
    _, ours, sentences = pair
    grads = []
    for save in (True, False):
        x = tokens(4).requires_grad_()
        with ours.instruction.given(sentences):
            request = ours.instruction.request
            y = ours(x) if save else checkpoint(ours, x, request, use_reentrant=False)
        with ours.instruction.given(sentences.flip(0)):
            grads.append(torch.autograd.grad(y.square().sum(), (x, *ours.parameters())))
    assert all(torch.equal(*both) for both in zip(*grads, strict=True))


def test_compiled_it_follows_the_instruction_without_breaks(pair):
    _, ours, sentences = pair
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    counter = torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    counter.clear()
    for rows, given in ((4, sentences), (4, sentences.flip(0)), (8, sentences)):
        x = tokens(rows)
        with ours.instruction.given(given):
            for grad in (False, True):
                with torch.set_grad_enabled(grad):
                    assert torch.equal(compiled(x), ours(x))
    assert counter["unique_graphs"] <= 4  # with and without gradients, and again for another batch


def test_parameters_of_another_dtype_and_autocast_follow_the_ffn(pair):
    _, ours, sentences = pair
    half = copy.deepcopy(ours)
    half.ffn.bfloat16()  # a frozen half-precision LLM, trained adapters in float32
    x = tokens(4).bfloat16()
    with half.instruction.given(sentences):
        y = half(x)
        y.sum().backward()
        assert y.dtype == torch.bfloat16 and half.up.grad.dtype == torch.float32
    with ours.instruction.given(sentences), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x.float()), y)
    assert ours.probabilities(sentences).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        inside = ours.probabilities(sentences)
    assert torch.equal(inside, ours.probabilities(sentences))


def test_one_adapter_needs_no_router_and_becomes_several(pair):
    dense, _, sentences = pair
    one = mole(1)
    below = {n.removeprefix("adapter."): p for n, p in dense.adapter.state_dict().items()}
    first = stack_adapters({n: p for n, p in below.items() if n.startswith("adapters.0.")})
    one.load_state_dict(first, strict=False)
    assert one.router is None and not any("router" in name for name in one.state_dict())
    x = tokens(4)
    y = one(x)

    def truth(dtype):
        return one.ffn.to(dtype)(x.to(dtype)) + dense.adapter.adapters[0].to(dtype)(x.to(dtype))

    plain, truth = truth(torch.float32), truth(torch.float64)
    assert_as_accurate("y", y, plain, truth)
    assert torch.equal(one.probabilities(sentences), torch.ones(4, 1))

    one.eval().double().reclone(EXPERTS)
    assert one.experts == EXPERTS and not one.router.training
    assert all(p.dtype == torch.float64 and p.requires_grad for p in one.parameters())
    assert all(torch.equal(one.up[k], one.up[0]) for k in range(EXPERTS))
    with one.instruction.given(sentences):
        assert_as_accurate("y of the copies", one(x.double()), truth, truth)
    one.up.data[1] += 1
    assert not torch.equal(one.up[0], one.up[1])
    one.reclone(1)
    assert one.router is None


def test_copies_have_their_own_instruction_and_the_originals_names_are_inverse(pair):
    _, ours, sentences = pair
    ours.instruction.set(sentences)
    two = nn.ModuleList([ours, copy.deepcopy(ours)])
    two[1].instruction = ours.instruction
    for copied in (copy.deepcopy(two), pickle.loads(pickle.dumps(two))):
        assert copied[0].instruction is copied[1].instruction is not ours.instruction
        assert copied[0].instruction.request is None
    state = ours.state_dict()
    original = unstack_adapters(state)
    assert original["adapters.3.up_proj.weight"].shape == (WIDTH, HIDDEN)
    assert original["adapters.0.scale"].shape == (1,) and "router_mlp.2.bias" in original
    back = stack_adapters(original)
    assert all(torch.equal(back.pop(n), p) for n, p in state.items() if not n.startswith("ffn."))
    assert not back
    scalar = stack_adapters({n: p.squeeze() if "scale" in n else p for n, p in original.items()})
    assert torch.equal(scalar["scale"], state["scale"])


def test_errors_name_what_is_wrong(pair):
    _, ours, sentences = pair
    x = tokens(4)
    with pytest.raises(RuntimeError, match="no instruction is set"):
        ours(x)
    for wrong in (torch.ones(3), torch.ones(0, SENTENCE), torch.ones(1, 2, dtype=torch.int64), [1]):
        with pytest.raises(ValueError, match=r"^Instruction: embedding must"):
            ours.instruction.set(wrong)
    for given, message in (
        (sentences[:3], "got 3 instructions for 4 rows"),
        (sentences[[0, 0, 1, 2, 3]], "got 5 instructions for 4 rows"),
        (sentences[:, 1:], rf"instructions must have shape \(B, {SENTENCE}\), got \(4, 15\)"),
    ):
        with ours.instruction.given(given), pytest.raises(ValueError, match=message):
            ours(x)
    with pytest.raises(ValueError, match=rf"x must have shape \(B, T, {WIDTH}\), got \(4, 5, 23\)"):
        ours(x[..., 1:])
    with pytest.raises(ValueError, match=r"ffn must return a tensor .* got tuple"):
        mole(1, ffn=Pair())(x)
    with pytest.raises(ValueError, match="experts must be at least 1, got 0"):
        ours.reclone(0)
    with pytest.raises(
        RuntimeError, match="down must hold 2 adapters, got 4: load into a model of 4"
    ):
        mole(2).load_state_dict(ours.state_dict())
    original = unstack_adapters(ours.state_dict())
    for broken, message in (
        ({n: p for n, p in original.items() if n != "adapters.1.scale"}, "hold adapters.1.scale"),
        (original | {"other": x}, r"nothing else, got \['other'\]"),
        ({}, r"hold adapters.0.\*"),
    ):
        with pytest.raises(ValueError, match=message):
            stack_adapters(broken)
    with pytest.raises(ValueError, match="hold up_bias"):
        unstack_adapters({n: p for n, p in ours.state_dict().items() if n != "up_bias"})


def test_a_hidden_width_that_the_op_has_not_is_refused_when_made():
    with pytest.raises(ValueError, match="hidden must be at most 128, got 129"):
        MixtureOfLanguageExperts(nn.Identity(), 4, hidden=129, instruction=Instruction())
