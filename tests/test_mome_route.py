"""``mixpert route --instruction``: what the routers of a saved MoME model say, as the model itself routes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from _mome import TEXTS, call, llm, make, write_bert
from test_cli import fail, run

from mixpert_kernels.hf import mome


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> mome.MomeForConditionalGeneration:
    bert = write_bert(tmp_path_factory.mktemp("bert"))
    return make(sentence_encoder=bert, seed=6)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    mome.save(model, root / "mome")
    return root


def test_it_is_what_the_model_does(model, saved, capsys):
    report = json.loads(
        run(capsys, "route", "--model", saved / "mome", "--instruction", *TEXTS, "--json")
    )
    assert report["checkpoint"] == str(saved / "mome")
    assert report["branches"] == ["clip", "dino", "pix"]
    assert [row["instruction"] for row in report["instructions"]] == TEXTS
    chosen, mixed = [], []
    handles = [
        layer.register_forward_hook(lambda layer, args, _: chosen.append(layer.route(args[0])[0]))
        for layer in model.layers
    ]
    router = model.move.router
    handles.append(router[-1].register_forward_hook(lambda _, __, y: mixed.append(y.softmax(-1))))
    with torch.no_grad():
        model(**call(model))
    for handle in handles:
        handle.remove()
    experts = torch.stack([routing.expert for routing in chosen], 1)
    assert [row["experts"] for row in report["instructions"]] == experts.tolist()
    assert not torch.equal(*experts)
    scores = torch.stack([routing.scores for routing in chosen], 1)
    for i, row in enumerate(report["instructions"]):
        torch.testing.assert_close(torch.tensor(row["scores"]), scores[i])
        weights = torch.tensor(list(row["weights"].values()))
        torch.testing.assert_close(weights, mixed[0].reshape(2, 3)[i])
        assert list(row["weights"]) == report["branches"]
    in_memory = mome.route(model, TEXTS)
    on_disk = mome.route(saved / "mome", TEXTS)
    for one, other in zip(in_memory[1:], on_disk[1:], strict=True):
        assert torch.equal(one, other)


def test_the_table(saved, capsys):
    argv = ["route", saved / "mome", "--instruction", TEXTS[0], "--instruction", TEXTS[1]]
    table = run(capsys, *argv)
    header, *rows = table.splitlines()
    assert header.split() == [
        "instruction",
        *("clip", "dino", "pix"),
        *["layer", "0", "layer", "1"],
    ]
    assert [row[: len(text)] for row, text in zip(rows, TEXTS, strict=True)] == TEXTS
    report = json.loads(run(capsys, *argv, "--json"))
    for row, text, want in zip(rows, TEXTS, report["instructions"], strict=True):
        *weights, first, second = row.removeprefix(text).split()
        assert weights == [f"{w:.3f}" for w in want["weights"].values()]
        assert [int(first), int(second)] == want["experts"]
    assert run(capsys, "route", saved / "mome" / "config.json", "--instruction", *TEXTS) == table


def test_only_routers_and_the_sentence_encoder_are_read(saved, capsys, tmp_path):
    bare = shutil.copytree(saved / "mome", tmp_path / "bare")
    want = run(capsys, "route", bare, "--instruction", *TEXTS)
    shutil.rmtree(bare / "llm")
    shutil.rmtree(bare / "encoders")
    assert run(capsys, "route", bare, "--instruction", *TEXTS) == want
    moved = shutil.move(bare / "sentence_encoder", tmp_path / "bert")
    assert (
        "SentenceEncoder: directory must exist"
        in fail(capsys, "route", bare, "--instruction", "a")[1]
    )
    argv = ["route", bare, "--sentence-encoder", moved, "--instruction", *TEXTS]
    assert run(capsys, *argv) == want


@pytest.mark.parametrize(
    "change", [{"experts": 1}, {"experts": 0}, {"mix": "addition", "experts": 0}]
)
def test_models_with_less_to_route(change, model, tmp_path):
    other = make(sentence_encoder=model.sentence_encoder, **change)
    mome.save(other, tmp_path)
    for found in (mome.route(other, TEXTS), mome.route(tmp_path, TEXTS)):
        assert found.experts.shape == (2, 0) and found.scores.shape[:2] == (2, 0)
        total = 3.0 if "mix" in change else 1.0
        torch.testing.assert_close(found.weights.sum(1), torch.full((2,), total))


def test_bad_input_is_one_line(saved, capsys, tmp_path):
    directory = saved / "mome"
    llm().save_pretrained(tmp_path / "llm")
    function = make()
    mome.save(function, tmp_path / "function")
    wide = write_bert(tmp_path / "wide")
    for argv, status, text in (
        ([directory, "photo.png"], 1, "existing file, got photo.png"),
        (
            [directory, directory / "config.json"],
            1,
            "a MoME model must be asked with --instruction",
        ),
        ([directory, "photo.png", "--instruction", "a"], 2, "--instruction takes no IMAGES"),
        (["--instruction", "a"], 2, "required: DIR"),
        ([directory], 2, "required: IMAGES"),
        (
            [directory, directory, "--sentence-encoder", wide],
            2,
            "--sentence-encoder is for --instr",
        ),
        ([directory, "--instruction"], 2, "expected at least one argument"),
        ([tmp_path / "none", "--instruction", "a"], 1, "route: directory must exist"),
        (
            [tmp_path / "llm", "--instruction", "a"],
            1,
            "a saved MoME model's, got: model_type llama",
        ),
        (
            [tmp_path / "function", "--instruction", "a"],
            1,
            "where no sentence encoder is given and the model has none",
        ),
    ):
        got, line = fail(capsys, "route", *argv)
        assert got == status and text in line, (argv, line)
    other = make(sentence_encoder=None, sentence_width=6)
    mome.save(other, tmp_path / "six")
    argv = [tmp_path / "six", "--sentence-encoder", wide, "--instruction", "a"]
    assert "sentence_encoder must give (1, 6), got (1, 8)" in fail(capsys, "route", *argv)[1]
