"""What the extra ``demo`` brings, and saying so where it is missing."""

from __future__ import annotations

from importlib.util import find_spec

PACKAGES = {"matplotlib": "matplotlib", "PIL": "pillow", "skimage": "scikit-image"}  # by module


def require_extra(*modules: str) -> None:
    """Raise RuntimeError with the pip command unless all ``modules`` can be imported."""
    missing = [PACKAGES[module] for module in modules if find_spec(module) is None]
    if missing:
        raise RuntimeError(
            f"{', '.join(missing)} must be installed, which the extra 'demo' does: pip install -e \".[demo]\""
        )
