"""Registration of the ops with torch: one boundary an op, one more for its backward."""

from __future__ import annotations

from collections.abc import Callable

import torch

_library = torch.library.Library("mixpert", "DEF")


def register(schema: str, run: Callable, fake: Callable) -> None:
    """Define ``mixpert::<schema>``, implemented on every device by ``run``, shaped by ``fake``."""
    name = schema.split("(")[0]
    _library.define(schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mixpert::{name}", fake, lib=_library)


def register_gradient(name: str, backward: Callable, setup_context: Callable) -> None:
    torch.library.register_autograd(
        f"mixpert::{name}", backward, setup_context=setup_context, lib=_library
    )


def register_no_second_gradient(name: str) -> None:
    """Make differentiating ``mixpert::<name>_backward`` an error that says so."""

    def refuse(ctx, *_):
        raise RuntimeError(f"{name}: double backward is not supported")

    torch.library.register_autograd(f"mixpert::{name}_backward", refuse, lib=_library)
