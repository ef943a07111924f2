"""Data sets: folders, manifests, `datasets` directories, and what is wrong with them."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import pytest
from _recipes import EXPERTS, LABELS, captioned_folder, labelled_folder, picture

from mixpert_kernels.training import data as data_module
from mixpert_kernels.training.batches import Order
from mixpert_kernels.training.data import (
    ImageSet,
    check_every_domain,
    check_labels_known,
    read_images,
)


def facts(images: ImageSet) -> list[tuple]:
    return sorted((s.domain, s.label, s.prompt, s.text) for s in images.samples)


def write_manifest(root: Path, name: str, kind: str) -> Path:
    """The images of a folder as a manifest beside it."""
    folder = (labelled_folder if kind == "label" else captioned_folder)(root / "images")
    found = read_images(folder, kind, EXPERTS)
    rows = []
    for sample in found.samples:
        row = {"image": str(Path(sample.name).relative_to(root)), "domain": sample.domain}
        values = (
            {"label": sample.label}
            if kind == "label"
            else {"prompt": sample.prompt, "text": sample.text}
        )
        rows.append(row | values)
    path = root / name
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def test_a_folder_of_labels(tmp_path: Path):
    root = labelled_folder(tmp_path / "images", each=2)
    (root / "photo" / "red" / "notes.md").write_text("no image")
    (root / ".cache").mkdir()
    images = read_images(root, "label", EXPERTS)
    assert Counter((s.domain, s.label) for s in images.samples) == {
        (domain, label): 2 for domain in ("photo", "chart") for label in LABELS
    }
    assert images.labels() == ["blue", "red"]
    index = [s.name for s in images.samples].index(str(root / "chart" / "blue" / "1.png"))
    assert images.open(index).tobytes() == picture("chart", "blue", 1).tobytes()


def test_a_folder_of_captions(tmp_path: Path):
    root = captioned_folder(tmp_path / "images", each=1)
    (root / "photo" / "0.txt").write_text("what ?\nfirst line\nsecond line\n")
    images = read_images(root, "text", EXPERTS)
    assert ("photo", None, "what ?", "first line\nsecond line") in facts(images)
    assert len(images) == 4


@pytest.mark.parametrize("kind", ["label", "text"])
@pytest.mark.parametrize("name", ["m.csv", "m.jsonl"])
def test_a_manifest_says_what_the_folder_says(name: str, kind: str, tmp_path: Path):
    manifest = read_images(write_manifest(tmp_path, name, kind), kind, EXPERTS)
    folder = read_images(tmp_path / "images", kind, EXPERTS)
    assert facts(manifest) == facts(folder)
    assert manifest.open(0).tobytes() == folder.open(0).tobytes()


@pytest.mark.parametrize("image", ["decoded", "path"])
def test_a_datasets_directory(image: str, tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    root = labelled_folder(tmp_path / "images")
    folder = read_images(root, "label", EXPERTS)
    names = [s.name for s in folder.samples]
    features = datasets.Features(
        {
            "image": datasets.Image() if image == "decoded" else datasets.Value("string"),
            "domain": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["blue", "red"]),
        }
    )
    table = datasets.Dataset.from_dict(
        {
            "image": names,
            "domain": [s.domain for s in folder.samples],
            "label": [s.label for s in folder.samples],
        },
        features=features,
    )
    table.save_to_disk(tmp_path / "saved")
    saved = read_images(tmp_path / "saved", "label", EXPERTS)
    assert facts(saved) == facts(folder) and saved.fingerprint != folder.fingerprint
    for i in (0, len(names) - 1):
        assert saved.open(i).tobytes() == folder.open(i).tobytes()
    table.remove_columns("domain").save_to_disk(tmp_path / "partial")
    with pytest.raises(ValueError, match="column domain"):
        read_images(tmp_path / "partial", "label", EXPERTS)
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match="one split"):
        read_images(tmp_path / "splits", "label", EXPERTS)


def test_datasets_missing_is_one_clear_line(tmp_path: Path, monkeypatch):
    for name in data_module.SAVED_DATASET:
        (tmp_path / name).write_text("{}")
    monkeypatch.setattr(data_module, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r'pip install -e "\.\[train\]"') as error:
        read_images(tmp_path, "label", EXPERTS)
    assert "\n" not in str(error.value)


def test_no_image_is_decoded_before_it_is_asked_for(tmp_path: Path):
    root = labelled_folder(tmp_path / "images", each=1)
    for path in root.rglob("*.png"):
        path.write_bytes(b"no image at all")
    images = read_images(root, "label", EXPERTS)
    assert len(images) == 4
    with pytest.raises(ValueError, match=r"must be a readable image, got: cannot identify"):
        images.open(0)


@pytest.mark.parametrize("fault", ["truncated", "empty", "missing", "text"])
def test_an_unreadable_image_is_named(fault: str, tmp_path: Path):
    root = labelled_folder(tmp_path / "images", each=1)
    images = read_images(root, "label", EXPERTS)
    path = Path(images.samples[0].name)
    whole = path.read_bytes()
    broken = {"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"hello", "missing": b""}
    path.write_bytes(broken[fault])
    if fault == "missing":
        path.unlink()
    with pytest.raises(ValueError, match="must be a readable image") as error:
        images.open(0)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def faults(root: Path) -> dict[str, tuple[str, str]]:
    """What to do to a folder, and what the message then says."""
    return {
        "domain": ("label", "domain must be one of versatile, photo, chart, got painting at"),
        "empty domain": ("label", "domain must hold images, got none in"),
        "loose image": ("label", "image must lie in a folder named as its label"),
        "no caption": ("text", "must have a 0.txt beside it"),
        "no answer": ("text", "caption must have an answer after its first line"),
        "nothing": ("label", "data must be a folder, a .csv or .jsonl manifest or a datasets"),
        "no image": ("label", "data must hold at least one image"),
    }


@pytest.mark.parametrize("name", list(faults(Path())))
def test_a_faulty_folder_is_refused(name: str, tmp_path: Path):
    kind, text = faults(tmp_path)[name]
    root = (labelled_folder if kind == "label" else captioned_folder)(tmp_path / "images")
    if name == "domain":
        (root / "painting" / "red").mkdir(parents=True)
    elif name == "empty domain":
        (root / "versatile" / "red").mkdir(parents=True)
    elif name == "loose image":
        picture("photo", "red", 0).save(root / "photo" / "loose.png")
    elif name == "no caption":
        (root / "photo" / "0.txt").unlink()
    elif name == "no answer":
        (root / "photo" / "0.txt").write_text("only a question\n")
    elif name == "nothing":
        root = tmp_path / "nowhere"
    else:
        root = tmp_path / "bare"
        root.mkdir()
    with pytest.raises(ValueError) as error:
        read_images(root, kind, EXPERTS)
    assert str(error.value).startswith("train: ") and text in str(error.value)


@pytest.mark.parametrize("name", ["m.csv", "m.jsonl"])
@pytest.mark.parametrize("column", ["image", "domain", "label"])
def test_a_manifest_without_a_column_is_refused(name: str, column: str, tmp_path: Path):
    path = write_manifest(tmp_path, name, "label")
    path.write_text(path.read_text(encoding="utf-8-sig").replace(column, "other"))
    with pytest.raises(ValueError, match=f"must have a column {column}, got .*{name}:"):
        read_images(path, "label", EXPERTS)


def test_broken_lines_of_a_manifest_are_numbered(tmp_path: Path):
    path = write_manifest(tmp_path, "m.jsonl", "label")
    path.write_text(path.read_text() + "{half\n")
    with pytest.raises(ValueError, match=r"m\.jsonl:\d+"):
        read_images(path, "label", EXPERTS)
    path.write_text('["a list"]\n')
    with pytest.raises(ValueError, match="JSON objects"):
        read_images(path, "label", EXPERTS)
    bad = write_manifest(tmp_path / "csv", "m.csv", "label")
    bad.write_text(bad.read_text(encoding="utf-8-sig").replace("chart,", "painting,"))
    with pytest.raises(ValueError, match=r"domain must be one of .*, got painting"):
        read_images(bad, "label", EXPERTS)


@pytest.mark.parametrize("kind, column", [("label", "label"), ("text", "text"), ("text", "image")])
@pytest.mark.parametrize("name", ["m.csv", "m.jsonl"])
def test_an_empty_cell_is_refused_and_an_empty_question_is_none(name, kind, column, tmp_path: Path):
    path = write_manifest(tmp_path, name, kind)
    row = {
        "image": "images/photo/0.png",
        "domain": "photo",
        "label": "x",
        "text": "x",
        "prompt": "",
    }
    start = path.read_text(encoding="utf-8-sig")

    def rewrite(row: dict[str, str]) -> None:
        cells = [row[c] for c in data_module.COLUMNS[kind]]
        path.write_text(start + (json.dumps(row) if name == "m.jsonl" else ",".join(cells)) + "\n")

    rewrite(row)
    assert read_images(path, kind, EXPERTS).samples[-1].prompt == ("" if kind == "text" else None)
    rewrite({**row, column: " "})
    with pytest.raises(ValueError, match=rf"{column} must not be empty, got .*{name}:\d+ without"):
        read_images(path, kind, EXPERTS)


def test_line_breaks_of_all_kinds(tmp_path: Path):
    """Windows' in a caption and a manifest, and within a JSON string one that is no line's end."""
    path = write_manifest(tmp_path, "m.jsonl", "text")
    row = {"image": "images/photo/0.png", "domain": "photo", "prompt": "?", "text": "a\u2028b"}
    path.write_bytes((json.dumps(row, ensure_ascii=False) + "\r\n").encode() * 2)
    assert [s.text for s in read_images(path, "text", EXPERTS).samples] == ["a\u2028b"] * 2
    (tmp_path / "images" / "photo" / "0.txt").write_bytes(b"?\r\none\r\ntwo\r\n")
    assert ("photo", None, "?", "one\ntwo") in facts(
        read_images(tmp_path / "images", "text", EXPERTS)
    )


@pytest.mark.parametrize("name", ["m.csv", "m.jsonl", "images/photo/0.txt"])
def test_text_that_is_not_utf8_is_named(name: str, tmp_path: Path):
    manifest = write_manifest(tmp_path, name if "m." in name else "m.csv", "text")
    faulty = tmp_path / name
    faulty.write_bytes(faulty.read_bytes() + "für\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"^train: text must be UTF-8, got ") as error:
        read_images(manifest if faulty == manifest else tmp_path / "images", "text", EXPERTS)
    assert str(faulty) in str(error.value) and "\n" not in str(error.value)


def test_a_domain_without_images_and_a_label_nobody_learnt_are_refused(tmp_path: Path):
    images = read_images(labelled_folder(tmp_path / "images"), "label", EXPERTS)
    check_every_domain(images, EXPERTS, tmp_path)
    with pytest.raises(ValueError, match="must hold images of domain document"):
        check_every_domain(images, [*EXPERTS, "document"], tmp_path)
    check_labels_known(images, ["blue", "red"], tmp_path)
    with pytest.raises(ValueError, match=r"0\.png must be one that the training data has, got red"):
        check_labels_known(images, ["blue", "green"], tmp_path)


def test_the_fingerprint_follows_the_samples_alone(tmp_path: Path):
    one, two = (labelled_folder(tmp_path / name) for name in ("one", "two"))
    first = read_images(one, "label", EXPERTS).fingerprint
    assert first == read_images(two, "label", EXPERTS).fingerprint
    (two / "photo" / "red" / "0.png").unlink()
    assert first != read_images(two, "label", EXPERTS).fingerprint


def test_the_order_is_a_permutation_an_epoch_wherever_it_starts():
    order = Order(seed=3, stage=1, images=10)
    batches = order.batches(4)
    stream = [next(batches) for _ in range(10)]
    flat = [index for batch in stream for index in batch]
    epochs = [flat[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert [order.batch(4, step) for step in range(10)] == stream
    assert next(Order(seed=3, stage=2, images=10).batches(4)) != stream[0]
    assert next(Order(seed=4, stage=1, images=10).batches(4)) != stream[0]
    assert sorted(order.batch(25, 0)[:10]) == list(range(10))  # more than an epoch
