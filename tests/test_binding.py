"""The routing reaches the leaves of the block that runs, and of no other: threads, nesting, errors, recomputation."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from mixpert_kernels import Routing
from mixpert_kernels.modules import expertize
from mixpert_kernels.modules.binding import bound_routing
from mixpert_kernels.testing import randomize_

D = 6


class Block(nn.Module):
    """A linear layer, a norm and a loose vector."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(D), nn.Linear(D, D)
        self.scale = nn.Parameter(torch.ones(D))

    def forward(self, x):
        return x + self.scale * self.linear(self.norm(x)).tanh()


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def route(ids, experts=3):
    return Routing.forced(torch.tensor(ids), experts)


def experts_of(block, experts=3):
    """Different experts, float64."""
    return randomize_(expertize(block, experts).double(), seed=1)


def test_a_leaf_outside_its_block_says_so():
    experts = expertize(nn.Sequential(nn.Linear(2, 2)), 2)
    with pytest.raises(RuntimeError, match="GroupedLinear: must be called by its ExpertBlock"):
        experts.block(torch.ones(1, 1, 2))


def test_a_block_within_a_block_keeps_its_own_routing():
    class Outer(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)
            self.inner = [inner]  # no submodule

        def forward(self, x):
            x = self.first(x)
            return self.second(self.inner[0](x, route([0, 0])))

    inner = experts_of(nn.Sequential(nn.Tanh(), nn.Linear(D, D)))
    outer = experts_of(Outer(inner))
    outer.block.inner = [inner]
    x = rand(2, 3, D)
    plain = [outer.select(e) for e in (2, 1)]
    hidden = torch.stack([p.first(x[b]) for b, p in enumerate(plain)])
    hidden = inner.select(0)(hidden)
    wanted = torch.stack([p.second(hidden[b]) for b, p in enumerate(plain)])
    torch.testing.assert_close(outer(x, route([2, 1])), wanted)


class Raises(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x):
        raise ZeroDivisionError


def test_an_exception_unbinds_the_routing():
    with pytest.raises(ZeroDivisionError):
        expertize(Raises(), 2)(torch.ones(1, 1, D), route([1], 2))
    with pytest.raises(RuntimeError, match="must be called by its ExpertBlock"):
        bound_routing("leaf")


def test_threads_do_not_see_each_others_routing():
    meet = threading.Barrier(2, timeout=20)

    class Meets(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(D, D)

        def forward(self, x):
            meet.wait()  # both have bound
            y = self.linear(x)
            meet.wait()  # neither has unbound
            return y

    experts, x, got = experts_of(Meets()), rand(2, 3, D), {}
    routes = ([2, 0], [1, 2])

    def work(i):
        got[i] = experts(x, route(routes[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    linear = experts.block.linear
    for i, ids in enumerate(routes):
        wanted = torch.einsum("btk,bnk->btn", x, linear.weight[ids]) + linear.bias[ids][:, None]
        torch.testing.assert_close(got[i], wanted)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("outside", [False, True])
def test_gradient_checkpointing_of_two_forwards_with_different_routes(outside, reentrant):
    """Both by transformers' flag and by a checkpoint around the call."""
    first, second = experts_of(Block()), experts_of(Block())
    x = rand(3, 3, D).requires_grad_()
    routes = (route([2, 0, 1]), route([1, 1, 0]))

    def keep(function, *args):
        return checkpoint(function, *args, use_reentrant=reentrant)

    def loss(checkpointed):
        call = first
        if checkpointed and outside:
            call = lambda x, routing: keep(first, x, routing)  # noqa: E731
        elif checkpointed:
            first.gradient_checkpointing, first._gradient_checkpointing_func = True, keep
        a, b = (call(x, r) for r in routes)
        first.gradient_checkpointing = False if not checkpointed else first.gradient_checkpointing
        return (a * b + second(b, routes[0])).sum()

    given = [x, *first.parameters()]
    wanted = torch.autograd.grad(loss(False), given)
    total = loss(True)
    for tensor in given:
        tensor.grad = None
    total.backward()  # the reentrant kind allows no autograd.grad
    for tensor, gradient in zip(given, wanted, strict=True):
        torch.testing.assert_close(tensor.grad, gradient)


def test_compiles_as_one_graph_for_every_route():
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    experts, x = experts_of(Block()), rand(4, 3, D)
    compiled = torch.compile(experts, backend=graphs, fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        routing = Routing.forced(torch.randint(3, (4,), generator=generator), 3)
        torch.testing.assert_close(compiled(x, routing), experts(x, routing))
    assert graphs.frame_count == 1
