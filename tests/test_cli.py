"""The command line: what it prints, what it writes, and that every error is one line and a status."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from mixpert_kernels import FusedMixpertTower, cli
from mixpert_kernels.cli import extras
from mixpert_kernels.hf.loading import load_preprocessing, load_tower, load_vision_model

Image = pytest.importorskip("PIL.Image")

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
NAMES = "versatile,photo,chart,document"
PREPROCESSING = {
    "image_processor_type": "SiglipImageProcessor",
    "size": {"height": 32, "width": 32},
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.5, 0.6, 0.7],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SigLIP checkpoint, the tower converted from it, and images of two colours by expert."""
    root = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    SiglipVisionModel(SiglipVisionConfig(**SIZES)).save_pretrained(root / "siglip")
    (root / "siglip" / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
    for expert, color in {"photo": "navy", "chart": "white"}.items():
        (root / "data" / expert).mkdir(parents=True)
        for shade in range(4):
            picture = Image.new("RGB", (60 + shade, 40), color)
            picture.putpixel((shade, 0), (255, 0, 0))
            picture.save(root / "data" / expert / f"{shade}.png")
    (root / "broken.png").write_bytes(b"not a picture")
    argv = ["convert", root / "siglip", "--out", root / "tower", "--projector-dim", 24]
    assert cli.main([*map(str, argv), "--expert-names", NAMES]) == 0
    return root


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    capsys.readouterr()
    status = cli.main([str(value) for value in argv])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out


def fail(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str]:
    """Run a command that must fail; returns its status and its only line on stderr."""
    capsys.readouterr()
    try:
        status = cli.main([str(value) for value in argv])
    except SystemExit as leave:
        status = int(leave.code or 0)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.endswith("\n"), captured.err
    assert captured.err.startswith("mixpert") and "Traceback" not in captured.err
    return status, captured.err


def test_convert_then_route(folder: Path, capsys):
    data = folder / "data"
    report = json.loads(
        run(capsys, "route", folder / "tower", data / "photo", data / "chart" / "0.png", "--json")
    )
    assert set(report) == {"checkpoint", "experts", "images"}
    assert report["experts"] == NAMES.split(",")
    assert [Path(row["image"]).name for row in report["images"]] == [
        *("0.png", "1.png", "2.png", "3.png"),
        "0.png",
    ]
    tower = FusedMixpertTower.from_pretrained(folder / "tower").eval()
    preprocess = load_preprocessing(folder / "tower", tower.config.vision_config)
    for row in report["images"]:
        assert set(row) == {"image", "expert", "name", "scores"}
        out = tower(preprocess([Image.open(row["image"])]))
        assert row["expert"] == int(out.expert) and row["name"] == report["experts"][row["expert"]]
        want = dict(zip(report["experts"], out.router_scores[0].tolist(), strict=True))
        assert row["scores"] == pytest.approx(want, abs=1e-5)


def test_route_prints_a_table_and_takes_a_file_of_the_checkpoint(folder: Path, capsys):
    image = folder / "data" / "photo" / "0.png"
    text = run(capsys, "route", folder / "tower" / "model.safetensors", image)
    header, row = text.splitlines()
    assert header.split() == ["image", "expert", *NAMES.split(",")]
    assert row.split()[0] == str(image) and len(row.split()) == 6


def test_convert_keeps_the_vision_model_and_the_preprocessing(folder: Path):
    tower, original = FusedMixpertTower.from_pretrained(folder / "tower").eval(), folder / "siglip"
    assert (tower.config.num_experts, tower.config.expert_layers) == (4, 2)
    assert json.loads((folder / "tower" / "preprocessor_config.json").read_text()) == PREPROCESSING
    vision, projector = tower.export_expert(2)
    plain, _ = load_vision_model(original)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want = projector(plain(pixels, output_hidden_states=True).hidden_states[-1])
        torch.testing.assert_close(
            tower(pixels, expert=torch.tensor([2, 0])).last_hidden_state, want
        )
    assert vision.config.num_hidden_layers == 4


def test_convert_takes_the_vision_model_of_a_dual_encoder(tmp_path: Path, capsys):
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    config = CLIPConfig(text_config=text, vision_config=SIZES, projection_dim=16)
    clip = CLIPModel(config).eval()
    clip.save_pretrained(tmp_path / "clip")
    out = run(
        capsys,
        "convert",
        tmp_path / "clip",
        "--layers",
        1,
        "--feature-layer",
        -2,
        "--out",
        tmp_path / "t",
    )
    assert "4 experts of the last 1 layers of a clip_vision_model" in out
    tower, pixels = load_tower(tmp_path / "t"), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        want = clip.vision_model(pixels, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(tower(pixels).last_hidden_state, want)


def test_a_failed_convert_leaves_nothing_behind(folder: Path, tmp_path: Path, capsys, monkeypatch):
    def stop(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("mixpert_kernels.cli.convert.shutil.copyfile", stop)
    status, line = fail(capsys, "convert", folder / "siglip", "--out", tmp_path / "new")
    assert status == 1 and "disk full" in line
    assert list(tmp_path.iterdir()) == []


def test_calibrate_picks_saves_and_plots(folder: Path, tmp_path: Path, capsys):
    pytest.importorskip("matplotlib")
    plot, out = tmp_path / "curve.png", tmp_path / "calibrated"
    argv = ("calibrate", folder / "tower", folder / "data", "--plot", plot, "--out", out)
    text = run(capsys, *argv)
    assert text.split()[:4] == ["delta", "accuracy", "fallback", "wrong"]
    chosen = float(text.partition("chosen    delta = ")[2].split()[0])
    before, after = (FusedMixpertTower.from_pretrained(path) for path in (folder / "tower", out))
    assert after.config.delta == pytest.approx(chosen) != before.config.delta
    for name, tensor in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor), name
    assert (out / "preprocessor_config.json").is_file()
    assert plot.stat().st_size > 5000
    assert "nothing was saved" in run(capsys, *argv[:3])


def test_info_json(capsys):
    facts = json.loads(run(capsys, "info", "--json"))
    assert set(facts) == {"versions", "machine", "ops", "measurements", "extension"}
    assert set(facts["versions"]) == {
        "python",
        "mixpert-kernels",
        "torch",
        "triton",
        "transformers",
    }
    assert facts["versions"]["torch"] == torch.__version__
    assert {"route", "grouped_linear", "grouped_layer_norm"} <= set(facts["ops"])
    for dtypes in facts["ops"].values():
        for choice in dtypes.values():
            assert choice["takes"] not in choice["others"] and all(choice["others"].values())
            assert choice["because"] and choice["measured"] == []
    assert {"extension", "archs", "reason", "cuda"} <= set(facts["extension"])


def test_info_prints_all_of_it(capsys):
    text = run(capsys, "info")
    for word in (
        "versions",
        "machine",
        "threads",
        "grouped_linear",
        "reference",
        "compiled extension",
    ):
        assert word in text


def test_info_says_which_architectures_are_left_out():
    from mixpert_kernels.cli.info import _extension_lines

    cuda = {"runtime": "13.0", "driver": None, "devices": [], "error": "no driver"}
    facts = {
        "extension": True,
        "archs": ["80+PTX"],
        "nvcc": "13.0",
        "compiler": "c++",
        "cuda": cuda,
    }
    lines = _extension_lines({**facts, "left_out": ["90a", "100"]})
    assert lines[2].startswith("MIXPERT_CUDA_ARCHS=all") and "90a, 100 (with kernels" in lines[2]
    assert not any("=all" in line for line in _extension_lines({**facts, "left_out": []}))


def wrong_calls(root: Path) -> dict[str, tuple[list[object], int, str]]:
    tower, siglip, picture = root / "tower", root / "siglip", root / "data" / "photo" / "0.png"
    out = ["--out", root / "unused"]
    return {
        "no command": ([], 2, "required: COMMAND"),
        "unknown command": (["dance"], 2, "invalid choice"),
        "no image": (["route", tower], 2, "required: IMAGES"),
        "bad number": (["convert", siglip, "--experts", "many", *out], 2, "invalid int value"),
        "unknown geometry": (["demo", "--geometry", "huge"], 2, "invalid choice: 'huge'"),
        "missing tower": (["route", root / "none", picture], 1, "directory must exist"),
        "not a tower": (["route", siglip, picture], 1, "mixpert convert"),
        "empty folder": (["route", root, picture], 1, "must hold config.json"),
        "missing image": (["route", tower, root / "none.png"], 1, "image must be an existing file"),
        "broken image": (["route", tower, root / "broken.png"], 1, "must be a readable image"),
        "folder without images": (["route", tower, siglip], 1, "must hold image files"),
        "missing model": (["convert", root / "none", *out], 1, "directory must exist"),
        "a tower already": (["convert", tower, *out], 1, "FusedMixpertTower already"),
        "too many layers": (["convert", siglip, "--layers", 4, *out], 1, "expert_layers must"),
        "no experts": (["convert", siglip, "--experts", 0, *out], 1, "num_experts must"),
        "too few names": (
            ["convert", siglip, "--experts", 3, "--expert-names", "a,b", *out],
            1,
            "--expert-names must be 3 different names",
        ),
        "a name twice": (["convert", siglip, "--expert-names", "a,b,a", *out], 1, "3 different"),
        "a blank name": (["convert", siglip, "--expert-names", "a, ,b", *out], 1, "blank, got 'a,"),
        "no width": (["convert", siglip, "--projector-dim", 0, *out], 1, "--projector-dim must"),
        "onto itself": (["convert", siglip, "--out", siglip], 1, "own directory"),
        "onto a file": (["convert", siglip, "--out", root / "broken.png"], 1, "got the file"),
        "onto another model": (["convert", tower, "--out", siglip], 1, "another model"),
        "no data": (["calibrate", tower, root / "none"], 1, "DATA_DIR must be an existing"),
        "unknown label": (["calibrate", tower, root], 1, "subfolder must be named as one of"),
        "empty label": (["calibrate", tower, root / "data" / "photo"], 1, "a subfolder an expert"),
        "bad share": (
            ["calibrate", tower, root / "data", "--max-errors", 2],
            1,
            "--max-errors must",
        ),
        "bad plot": (["calibrate", tower, root / "data", "--plot", "x.txt"], 1, "--plot must be"),
        "demo's experts": (["demo", "--experts", 99], 1, "experts must lie in 1..8"),
        "demo's folder": (["demo", "--images", root / "none"], 1, "existing directory"),
        "demo's model": (["demo", "--model", root / "none"], 1, "directory must exist"),
    }


@pytest.mark.parametrize("name", list(wrong_calls(Path())))
def test_every_error_is_one_line_and_a_status(
    name: str, folder: Path, tmp_path, capsys, monkeypatch
):
    if name.startswith("demo"):
        pytest.importorskip("skimage")
    monkeypatch.chdir(tmp_path)
    argv, status, text = wrong_calls(folder)[name]
    got, line = fail(capsys, *argv)
    assert got == status and text in line
    assert list(tmp_path.iterdir()) == [] and not (folder / "unused").exists()


def test_damaged_checkpoints_are_named(folder: Path, tmp_path: Path, capsys):
    picture = folder / "data" / "photo" / "0.png"
    broken = shutil.copytree(folder / "tower", tmp_path / "tower")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in fail(capsys, "route", broken, picture)[1]
    (broken / "config.json").write_text("{")
    assert "config.json" in fail(capsys, "route", broken, picture)[1]
    BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    ).save_pretrained(tmp_path / "bert")
    argv = ("convert", tmp_path / "bert", "--out", tmp_path / "out")
    assert "must hold a vision model, got bert" in fail(capsys, *argv)[1]


def test_a_checkpoint_without_a_weight_is_refused(folder: Path, tmp_path: Path, capsys):
    from safetensors.torch import load_file, save_file

    partial = shutil.copytree(folder / "siglip", tmp_path / "siglip")
    state = load_file(partial / "model.safetensors")
    name = next(key for key in state if key.endswith("layers.1.mlp.fc1.weight"))
    del state[name]
    save_file(state, partial / "model.safetensors", {"format": "pt"})
    status, line = fail(capsys, "convert", partial, "--out", tmp_path / "out")
    assert status == 1 and "layers.1.mlp.fc1.weight" in line
    assert not (tmp_path / "out").exists()


def test_a_missing_extra_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "skimage" else object())
    status, line = fail(capsys, "demo")
    assert status == 1 and "scikit-image" in line and 'pip install -e ".[demo]"' in line


def test_unexpected_errors_are_one_line_too(capsys, monkeypatch):
    def boom() -> None:
        raise KeyError("first\nsecond")

    monkeypatch.setattr("mixpert_kernels.cli.info.collect", boom)
    assert fail(capsys, "info")[0] == 1
    monkeypatch.setenv("MIXPERT_DEBUG", "1")
    with pytest.raises(KeyError):
        cli.main(["info"])


@pytest.mark.parametrize(
    ("settings", "height"),
    [
        (
            {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3},
            32,
        ),
        ({"size": 40, "crop_size": 32, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}, 32),
        (
            {"image_processor": PREPROCESSING | {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}},
            32,
        ),
    ],
)
def test_preprocessing_follows_the_files_settings(settings: dict, height: int, tmp_path: Path):
    name = "processor_config.json" if "image_processor" in settings else "preprocessor_config.json"
    (tmp_path / name).write_text(json.dumps(settings))
    preprocess = load_preprocessing(tmp_path, None)
    pixels = preprocess([Image.new("RGB", (90, 50), "white"), Image.new("L", (40, 70), 0)])
    assert pixels.shape == (2, 3, height, height) and pixels.dtype == torch.float32
    torch.testing.assert_close(pixels.amax((1, 2, 3)), torch.tensor([2.0, -2.0]))


def test_preprocessing_without_settings_scales_to_one(tmp_path: Path):
    preprocess = load_preprocessing(tmp_path, SiglipVisionConfig(**SIZES))
    pixels = preprocess([Image.new("RGB", (9, 5), "white"), Image.new("RGB", (9, 5), "black")])
    assert pixels.shape == (2, 3, 32, 32)
    torch.testing.assert_close(pixels.mean((1, 2, 3)), torch.tensor([1.0, -1.0]))


def test_the_installed_command_exits_with_the_status(tmp_path: Path):
    argv = [sys.executable, "-m", "mixpert_kernels.cli", "route", "nowhere", "nothing.png"]
    done = subprocess.run(
        argv, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "mixpert route: route: image must be an existing file, got nothing.png\n"


def test_projector_of_the_checkpoint_is_kept_out_of_plain_vision_models(folder: Path):
    vision, projector = load_vision_model(folder / "siglip")
    assert isinstance(vision, SiglipVisionModel) and projector is None
    assert isinstance(load_tower(folder / "tower").projector, nn.Module)
