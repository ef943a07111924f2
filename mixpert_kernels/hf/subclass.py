"""A module's class swapped for a subclass of the same name, made on the fly.

Whatever goes by ``isinstance`` or by a class's name finds what it found before.
"""

from __future__ import annotations

import functools

from torch import nn


@functools.cache
def subclass(plain: type, *mixins: type) -> type:
    """A subclass of ``plain`` under its name, with ``mixins`` before it."""
    names = {
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "mixpert_plain": plain,
    }
    return type(plain)(plain.__name__, (*mixins, plain), {**names, "__doc__": plain.__doc__})


def plain_class(module: nn.Module) -> type:
    return getattr(type(module), "mixpert_plain", type(module))
