"""What the extras bring, and saying so where it is missing."""

from __future__ import annotations

from importlib.util import find_spec

PACKAGES = {  # by module
    "matplotlib": "matplotlib",
    "PIL": "pillow",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
}


def require_extra(*modules: str, extra: str = "demo") -> None:
    """Raise RuntimeError with the pip command unless all ``modules`` can be imported."""
    missing = [PACKAGES[module] for module in modules if find_spec(module) is None]
    if missing:
        raise RuntimeError(
            f"{', '.join(missing)} must be installed, which the extra '{extra}' does: pip install -e \".[{extra}]\""
        )
