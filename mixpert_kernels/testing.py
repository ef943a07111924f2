"""What tests of numerical code need: a tolerance that is derived, and parameters that are not degenerate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def assert_as_accurate(
    name: str,
    got: Tensor,
    plain: Tensor,
    truth: Tensor,
    *,
    draws: Sequence[tuple[Tensor, Tensor]] = (),
) -> None:
    """Raise AssertionError unless ``got`` is about as close to ``truth`` as ``plain`` is.

    ``max |got - truth| <= 2 max |plain - truth| + eps``. ``plain`` is the same quantity by plain PyTorch in the dtype
    of ``got``, so the bound follows the dtype, the sizes and the data by itself. ``eps`` is one rounding of the largest
    value, ``finfo(dtype).eps * max |truth|``: where plain PyTorch happens to be exact, another order of the sum may
    still round once.

    Args:
        name: of the quantity, for the message.
        got: the tensor under test.
        plain: what plain PyTorch gives, of the same shape and dtype.
        truth: the same in float64.
        draws: more pairs of ``plain`` and ``truth``, of other data of the same kind. How exact plain PyTorch is on a
            few values is luck, and another's on every CPU: the largest error of all draws counts.

    Example:
        >>> third = torch.tensor([1 / 3])
        >>> assert_as_accurate("y", third, third, torch.tensor([1 / 3], dtype=torch.float64))
    """
    for what, tensor in (("plain", plain), ("truth", truth)):
        if got.shape != tensor.shape:
            raise AssertionError(f"{name}: shape {tuple(got.shape)}, {what} {tuple(tensor.shape)}")
    if got.dtype != plain.dtype:
        raise AssertionError(f"{name}: dtype {got.dtype}, plain {plain.dtype}")
    if got.numel() == 0:
        return
    error, bound = error_and_bound(got, plain, truth)
    for pair in draws:
        bound = max(bound, error_and_bound(got, *pair)[1])
    if not error <= bound:  # so written that NaN fails
        raise AssertionError(f"{name}: error {error:.3e}, more than {bound:.3e} ({got.dtype})")


def error_and_bound(got: Tensor, plain: Tensor, truth: Tensor) -> tuple[float, float]:
    """The two sides of ``assert_as_accurate``'s inequality, for tensors that are not empty."""
    truth = truth.double()
    error = (got.double() - truth).abs().max().item()
    bound = 2 * (plain.double() - truth).abs().max().item()
    return error, bound + torch.finfo(got.dtype).eps * truth.abs().max().item()


@torch.no_grad()
def randomize_(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every floating-point parameter in place, so that no two experts agree and no bias, gain or scale is idle.

    Matrices keep the scale of a fresh layer (standard deviation ``K ** -0.5`` over their last dimension); vectors and
    rows of vectors become normal around 0 (biases) or 1 (what was constant and not 0: gains, LayerScales).

    Args:
        module: changed in place.
        seed: the same seed gives the same parameters on every device.

    Returns:
        ``module``.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if not parameter.is_floating_point():
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        first = parameter.flatten()[:1].float()
        gain = bool((parameter == parameter.flatten()[:1]).all()) and bool(first != 0)
        square = parameter.ndim > 1 and not gain and parameter.shape[-2] > 1
        noise = noise * parameter.shape[-1] ** -0.5 if square else 0.3 * noise + gain
        parameter.copy_(noise)
    return module
