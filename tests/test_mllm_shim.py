"""Directories of mixpertized models that load with trust_remote_code=True and no import of this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from _mllms import KINDS
from test_mllm_parity import mixed
from test_mllm_saving import load

from mixpert_kernels import cli

WORKER = Path(__file__).with_name("_shim_worker.py")
DTYPES = ("float32", "bfloat16")
pytestmark = pytest.mark.usefixtures("one_thread")  # the logits are compared bitwise


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Every family, saved and loaded again in one process of its own."""
    folder = tmp_path_factory.mktemp("models")
    for family, kind in KINDS.items():
        kind.build().save_pretrained(folder / "plain" / family)
        for dtype in DTYPES:
            path = folder / f"{family}-{dtype}"
            plain = load(folder / "plain" / family, dtype=getattr(torch, dtype))
            model = mixed(kind, distinct=True, model=plain)
            model.save_pretrained(path, max_shard_size="1GB" if dtype == "float32" else "10KB")
            inputs = kind.call(kind.prompts["batch"])
            torch.save(inputs, path / "inputs.pt")
            with torch.no_grad():
                torch.save(model(**inputs).logits, path / "logits.pt")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(folder / "code")}
    subprocess.run([sys.executable, WORKER, folder], env=environment, check=True, timeout=300)
    return folder


@pytest.fixture(scope="module")
def results(folder) -> dict[str, Any]:
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", KINDS)
def test_every_family_loads_without_an_import(family, dtype, folder, results):
    path = folder / f"{family}-{dtype}"
    found, wanted = results[path.name], torch.load(path / "logits.pt")
    assert found["class"] == KINDS[family].model
    assert found["module"].startswith("transformers.models.")
    assert found["logits"].dtype == wanted.dtype and torch.equal(found["logits"], wanted)
    assert (len(list(path.glob("*.safetensors"))) > 2) == (dtype == "bfloat16")

    again = path / "again"
    code = [[file.name for file in place.glob("*.py")] for place in (path, again)]
    assert code == [["modeling_mixpert.py"]] * 2
    configs = [json.loads((place / "config.json").read_text()) for place in (path, again)]
    for name in ("architectures", "auto_map", "mixpert", "model_type"):
        assert configs[0][name] == configs[1][name]
    assert configs[0]["architectures"] == [KINDS[family].model]


def test_convert_writes_it(folder, tmp_path):
    assert (
        cli.main(["convert", str(folder / "plain" / "llava"), "--out", str(tmp_path / "out")]) == 0
    )
    assert (tmp_path / "out" / "modeling_mixpert.py").is_file()
    found = json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]
    assert set(found.values()) == {"modeling_mixpert.LlavaForConditionalGeneration"}


def test_without_the_package_the_error_names_it(results):
    assert results["not installed"].startswith("ImportError: ")
    assert (
        "packages that were not found in your environment: mixpert_kernels"
        in results["not installed"]
    )


def test_without_trust_loading_fails(results):
    """By transformers' own words: nothing of a directory that is not trusted can say better ones."""
    assert results["not trusted"].startswith("RuntimeError: You set `ignore_mismatched_sizes`")
