"""Loads saved models by transformers alone, as somebody does who never heard of this package.

``python _shim_worker.py DIRECTORY``: a folder a model, with ``inputs.pt`` beside its checkpoint. Writes
``results.pt``: of each model what came out, and the words of the errors that are expected.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

trusted = {"trust_remote_code": True, "dtype": "auto"}


class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: object, target: object = None) -> None:
        if name == "mixpert_kernels":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def words_of(call: Callable) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def run(path: Path) -> dict:
    auto = "AutoModelForMultimodalLM" if "bfloat16" in path.name else "AutoModelForImageTextToText"
    model = getattr(transformers, auto).from_pretrained(path, **trusted)
    with torch.no_grad():
        logits = model(**torch.load(path / "inputs.pt")).logits
    model.save_pretrained(path / "again")
    return {"class": type(model).__name__, "module": type(model).__module__, "logits": logits}


def main(folder: Path) -> None:
    paths = sorted(path.parent for path in folder.glob("*/inputs.pt"))
    auto = transformers.AutoModelForImageTextToText
    results = {"not trusted": words_of(lambda: auto.from_pretrained(paths[0]))}
    assert "mixpert_kernels" not in sys.modules
    sys.meta_path.insert(0, NotInstalled())
    results["not installed"] = words_of(lambda: auto.from_pretrained(paths[0], **trusted))
    del sys.meta_path[0]
    results |= {path.name: run(path) for path in paths}
    torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
