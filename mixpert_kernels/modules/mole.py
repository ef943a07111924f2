"""MixtureOfLanguageExperts: a decoder's FFN with K adapters beside it; each sample's instruction chooses one."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixpert_kernels.ops import grouped_adapter
from mixpert_kernels.ops.grouped_adapter import MAX_HIDDEN
from mixpert_kernels.routing import Routing

from .grouped import accurate

SENTENCE_WIDTH = 384  # of all-MiniLM-L6-v2


class Request:
    """What all layers are told of one request: its instructions' embedding, and what each layer decided for it.

    A layer decides again only where gradients are needed: a token that is generated costs no router.
    """

    def __init__(self, embedding: Tensor) -> None:
        self.embedding = embedding  # (B, S)
        self._decided: dict[int, tuple[Any, Routing]] = {}

    def decided(self, layer: int, state: Any) -> Routing | None:
        """What a layer decided while it was in this state; None if it has not, or its state has changed."""
        known, routing = self._decided.get(layer, (None, None))
        return routing if known == state else None

    def decide(self, layer: int, state: Any, routing: Routing) -> None:
        self._decided[layer] = state, routing


class _Thread(threading.local):
    def __init__(self) -> None:
        self.request: Request | None = None


class Instruction:
    """Where the instructions of a request are set, once for all layers of a model.

    What is set is seen by the thread that set it, and by no other: requests in several threads do not meet. A copy of
    the model, by ``copy`` or ``pickle``, has its own, with nothing set.

    Example:
        >>> instruction = Instruction()
        >>> with instruction.given(torch.ones(2, 384)):  # of two samples
        ...     instruction.request.embedding.shape
        torch.Size([2, 384])
    """

    def __init__(self) -> None:
        self._thread = _Thread()

    def __reduce__(self) -> tuple:
        return type(self), ()

    @property
    def request(self) -> Request | None:
        """This thread's; None if nothing is set."""
        return self._thread.request

    def set(self, embedding: Tensor) -> None:
        """Set the sentence embeddings (B, S) of a request's B instructions, until the next call of this thread.

        Raises:
            ValueError: not a floating-point matrix with at least one row.
        """
        self.bind(_request(embedding))

    def clear(self) -> None:
        self.bind(None)

    @contextlib.contextmanager
    def given(self, embedding: Tensor) -> Iterator[None]:
        """Set the embeddings (B, S) for a block of code, and what was set before thereafter."""
        before = self.bind(_request(embedding))
        try:
            yield
        finally:
            self.bind(before)

    def bind(self, request: Request | None) -> Request | None:
        """Set a request, and return what was set before."""
        before, self._thread.request = self._thread.request, request
        return before


def _request(embedding: Tensor) -> Request:
    if not isinstance(embedding, Tensor) or not embedding.is_floating_point():
        kind = embedding.dtype if isinstance(embedding, Tensor) else type(embedding).__name__
        raise ValueError(f"Instruction: embedding must be a floating-point tensor, got {kind}")
    if embedding.ndim != 2 or not len(embedding):
        shape = tuple(embedding.shape)
        raise ValueError(f"Instruction: embedding must have shape (B, S) with B > 0, got {shape}")
    return Request(embedding)


class InstructionRouter(nn.Sequential):
    """Linear, GELU, Linear: sentence embeddings (B, S) to logits (B, K).

    In float32 whatever the parameters' dtype, and autocast, are: a decision should not hang on rounding.
    """

    def __init__(self, width: int, experts: int, **like: Any) -> None:
        super().__init__(
            nn.Linear(width, width, **like), nn.GELU(), nn.Linear(width, experts, **like)
        )

    def forward(self, embedding: Tensor) -> Tensor:
        x = accurate(embedding)
        with torch.autocast(x.device.type, enabled=False):
            for layer in self:
                if type(layer) is nn.Linear:
                    x = F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
                else:  # the GELU, or what wraps a Linear, such as a LoRA's, in its own dtype
                    floating = (p for p in layer.parameters() if p.is_floating_point())
                    x = layer(x.to(next(floating, x).dtype)).to(x.dtype)
        return x


class MixtureOfLanguageExperts(nn.Module):
    """An FFN and K adapters on its input, of which each sample gets one: ``y = ffn(x) + Adapter_e(x)``.

    ``Adapter_k(x) = scale_k (relu(x down_k^T + down_bias_k) up_k^T + up_bias_k)`` and ``e`` the argmax of the layer's
    own router on the sentence embedding of the sample's instruction. All tokens of a sample share it, and no
    probability scales the result. As made, with ``up`` and ``up_bias`` 0, y is bitwise ffn(x).

    In training the router gets the straight-through gradient of every adapter, see ``ops.grouped_adapter``; adapters
    that no sample chose get a gradient of exact zeros, so that all processes of DDP reduce the same parameters. In
    inference one adapter of K is computed, and a request is routed once.

    One adapter alone (K = 1) needs no router: ``router`` is None then, and no instruction need be set.

    Args:
        ffn: from x (B, T, D) to a tensor of its shape.
        width: D.
        experts: K.
        hidden: H, at most 128.
        sentence_width: S, of the embeddings.
        instruction: that all layers of a model share.
        device: of the new parameters.
        dtype: of the new parameters, which may be another than the FFN's: they are converted to its output's.

    Shape: x (k B, T, D) -> as x, with embeddings (B, S) set: rows k b to k b + k - 1 are sample b's, the order in which
    beams and several returned sequences come. Parameters: ``down`` (K, H, D), ``down_bias`` (K, H), ``up`` (K, D, H),
    ``up_bias`` (K, D), ``scale`` (K,); children ``ffn`` and ``router``.

    Raises:
        ValueError: a size is below 1, or ``hidden`` above 128.
    """

    def __init__(
        self,
        ffn: nn.Module,
        width: int,
        *,
        experts: int = 4,
        hidden: int = 64,
        sentence_width: int = SENTENCE_WIDTH,
        instruction: Instruction,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"width": width, "hidden": hidden, "sentence_width": sentence_width}
        _check_sizes(**sizes, experts=experts)
        if hidden > MAX_HIDDEN:
            raise ValueError(f"{NAME}: hidden must be at most {MAX_HIDDEN}, got {hidden}")
        like = {"device": device, "dtype": dtype}
        self.ffn, self.instruction = ffn, instruction
        self.width, self.hidden, self.sentence_width = width, hidden, sentence_width
        self.router = InstructionRouter(sentence_width, experts, **like) if experts > 1 else None
        self.down = nn.Parameter(torch.empty(experts, hidden, width, **like))
        self.down_bias = nn.Parameter(torch.empty(experts, hidden, **like))
        self.up = nn.Parameter(torch.empty(experts, width, hidden, **like))
        self.up_bias = nn.Parameter(torch.empty(experts, width, **like))
        self.scale = nn.Parameter(torch.empty(experts, **like))
        self.reset_parameters()

    @property
    def experts(self) -> int:
        return self.down.shape[0]

    def reset_parameters(self) -> None:
        """Initialise the adapters: ``down`` as nn.Linear does, ``up`` and its bias 0, ``scale`` 1."""
        bound = self.width**-0.5
        for parameter in (self.down, self.down_bias):
            nn.init.uniform_(parameter, -bound, bound)
        for parameter in (self.up, self.up_bias):
            nn.init.zeros_(parameter)
        nn.init.ones_(self.scale)

    def reclone(self, experts: int) -> None:
        """Become ``experts`` copies of adapter 0, with a new router: from stage 1 to stage 2.

        On the device, in the dtype and trainable as they were.
        """
        _check_sizes(experts=experts)
        for name in ADAPTER:
            old = getattr(self, name)
            copies = old.detach()[:1].repeat(experts, *[1] * (old.ndim - 1))
            setattr(self, name, nn.Parameter(copies, requires_grad=old.requires_grad))
        like = {"device": self.down.device, "dtype": self.down.dtype}
        router = InstructionRouter(self.sentence_width, experts, **like) if experts > 1 else None
        if router is not None:
            router.train(self.training).requires_grad_(self.down.requires_grad)
        self.router = router

    def forward(self, x: Tensor, request: Request | None = None) -> Tensor:
        """Compute the FFN and the chosen adapters.

        Args:
            x: (k B, T, D).
            request: whose embeddings count; None: what is set. A caller that runs the layer again in backward,
                such as gradient checkpointing, passes ``instruction.request``, for then another may be set.

        Raises:
            ValueError: x is of another width, or k is no whole number, or the embeddings are of another width.
            RuntimeError: no instruction is set.
        """
        if x.ndim != 3 or x.shape[-1] != self.width:
            raise ValueError(
                f"{NAME}: x must have shape (B, T, {self.width}), got {tuple(x.shape)}"
            )
        y = self.ffn(x)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"{NAME}: ffn must return a tensor {tuple(x.shape)}, got {got}")
        routing, probabilities = self.route(x, request)
        # The FFN decides the dtype, under autocast too, where it is a Linear's.
        adapter = (getattr(self, name).to(y.dtype) for name in ADAPTER)
        with torch.autocast(x.device.type, enabled=False):
            return grouped_adapter(
                x.to(y.dtype), *adapter, routing, residual=y, probabilities=probabilities
            )

    def route(self, x: Tensor, request: Request | None = None) -> tuple[Routing, Tensor | None]:
        """Choose the adapter of each row of x (k B, T, D).

        Returns:
            The routing, with the probabilities as its scores, and the probabilities (k B, K) where they need a
            gradient.
        """
        request = self.instruction.request if request is None else request
        if request is None and self.router is not None:
            raise RuntimeError(
                f"{NAME}: no instruction is set in this thread, which is needed to choose an adapter: "
                "call the model within instruction.given(embedding)"
            )
        state = None if request is None else self._state(x, request.embedding)
        routing = None if state is None else request.decided(id(self), state)
        if routing is not None:
            return routing, None
        probabilities = None
        if self.router is None:
            routing = Routing.single(len(x), x.device)
        else:
            routing, probabilities = self._choose(x, request.embedding)
        if state is not None:
            request.decide(id(self), state, routing)
        return routing, probabilities

    def _choose(self, x: Tensor, embedding: Tensor) -> tuple[Routing, Tensor | None]:
        probabilities = self.probabilities(embedding.to(x.device))
        rows, samples = len(x), len(probabilities)
        if rows % samples:
            raise ValueError(
                f"{NAME}: instructions must be one for each sample, each a whole number of the batch's rows, "
                f"got {samples} instructions for {rows} rows"
            )
        times = rows // samples
        if times != 1:
            probabilities = probabilities.repeat_interleave(times, dim=0)
        scores = probabilities.detach()
        routing = Routing.forced(scores.argmax(1), self.experts, scores)
        return routing, probabilities if probabilities.requires_grad else None

    def _state(self, x: Tensor, embedding: Tensor) -> tuple | None:
        """All that a decision hangs on; None where it has to be made anew, to be differentiated, traced or captured."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        tensors = () if self.router is None else (embedding, *self.router.parameters())
        if any(type(t) not in (Tensor, nn.Parameter) for t in tensors):
            return None
        # Of a tensor that is replaced the address differs, of one that is written to the version.
        return len(x), x.device, *((t.data_ptr(), _version(t)) for t in tensors)

    def probabilities(self, embedding: Tensor) -> Tensor:
        """The router's softmax on sentence embeddings (B, S): (B, K) float32. Of one adapter alone: ones."""
        if embedding.ndim != 2 or embedding.shape[1] != self.sentence_width:
            raise ValueError(
                f"{NAME}: instructions must have shape (B, {self.sentence_width}), got {tuple(embedding.shape)}"
            )
        if self.router is None:
            return accurate(torch.ones_like(embedding[:, :1]))
        return self.router(embedding).softmax(1)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, *rest) -> None:
        """Name a number of adapters that differs; the rest is nn.Module's."""
        _, errors = rest
        down = state_dict.get(f"{prefix}down")
        if down is not None and down.ndim == 3 and len(down) != self.experts:
            errors.append(
                f"{NAME}: {prefix}down must hold {self.experts} adapters, got {len(down)}: load into a model of "
                f"{len(down)}; reclone({self.experts}) makes {self.experts} copies of its first"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)

    def extra_repr(self) -> str:
        return f"{self.width}, experts={self.experts}, hidden={self.hidden}"


NAME = MixtureOfLanguageExperts.__name__
ADAPTER = ("down", "down_bias", "up", "up_bias", "scale")
# Ours, and the original's, of adapter k at adapters.k.
_ORIGINAL = {
    "down": "down_proj.weight",
    "down_bias": "down_proj.bias",
    "up": "up_proj.weight",
    "up_bias": "up_proj.bias",
    "scale": "scale",
}
_ROUTER = ("router.", "router_mlp.")


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # those of inference mode have none


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{NAME}: {name} must be at least 1, got {size}")


def stack_adapters(original: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """From one layer's names in the original code to those of this module.

    Args:
        original: below ``mlp.adapter.``: ``adapters.k.{down_proj,up_proj}.{weight,bias}``, ``adapters.k.scale`` and,
            where there are several adapters, ``router_mlp.{0,2}.{weight,bias}``.

    Returns:
        ``down``, ``down_bias``, ``up``, ``up_bias``, ``scale`` and ``router.*``.

    Raises:
        ValueError: a name is missing or unknown.
    """
    names = [name.split(".")[1] for name in original if name.startswith("adapters.")]
    count = len(set(names))
    if not count:
        raise ValueError(
            f"stack_adapters: original must hold adapters.0.*, got {sorted(original)[:4]}"
        )
    left, stacked = dict(original), {}
    for ours, theirs in _ORIGINAL.items():
        keys = [f"adapters.{k}.{theirs}" for k in range(count)]
        missing = [key for key in keys if key not in left]
        if missing:
            raise ValueError(f"stack_adapters: original must hold {missing[0]}, and does not")
        rows = torch.stack([left.pop(key) for key in keys])
        stacked[ours] = rows.reshape(count) if ours == "scale" else rows
    ours, theirs = _ROUTER
    for key in [key for key in left if key.startswith(theirs)]:
        stacked[ours + key.removeprefix(theirs)] = left.pop(key)
    if left:
        raise ValueError(f"stack_adapters: original must hold nothing else, got {sorted(left)[:4]}")
    return stacked


def unstack_adapters(stacked: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``stack_adapters``; what belongs to the FFN (``ffn.*``) is left out."""
    missing = [name for name in ADAPTER if name not in stacked]
    if missing:
        raise ValueError(f"unstack_adapters: stacked must hold {missing[0]}, and does not")
    original = {}
    for k in range(len(stacked["down"])):
        for ours, theirs in _ORIGINAL.items():
            row = stacked[ours][k]
            original[f"adapters.{k}.{theirs}"] = row.reshape(1) if ours == "scale" else row
    ours, theirs = _ROUTER
    routers = {key: value for key, value in stacked.items() if key.startswith(ours)}
    return original | {theirs + key.removeprefix(ours): v for key, v in routers.items()}
