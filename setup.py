"""Build the optional compiled extension; everything else is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import Extension, setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))
from build_extension import NAME, SOURCES, BuildExtension

setup(ext_modules=[Extension(NAME, SOURCES)], cmdclass={"build_ext": BuildExtension})
