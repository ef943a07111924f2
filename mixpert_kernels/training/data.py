"""Labelled and captioned images: a folder, a manifest or a `datasets` directory, decoded when they are asked for."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
COLUMNS = {
    "label": ("image", "domain", "label"),
    "text": ("image", "domain", "prompt", "text"),
    "instruction": ("image", "instruction", "text"),
}
ONE_TASK = "all"  # the domain of instructions that come without
FIELDS = {"instruction": "prompt"}  # of a Sample, where a column's name is another
MANIFESTS = (".csv", ".jsonl")
SAVED_DATASET = ("state.json", "dataset_info.json")  # what `Dataset.save_to_disk` leaves behind


@dataclass(frozen=True)
class Sample:
    """One image and what is to be learnt from it.

    Attributes:
        name: what to call it in messages: its path, or its row.
        domain: the expert it belongs to, or the task.
        label: its class, for a classifier.
        prompt: the question or instruction, for a language model.
        text: the answer.
    """

    name: str
    domain: str
    label: str | None = None
    prompt: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class ImageSet:
    """Samples in a fixed order, and how to open the image of one.

    Attributes:
        samples: all of them; no image is held.
        sources: what ``open`` reads for each: a path, or a function that returns encoded bytes.
    """

    samples: list[Sample]
    sources: Sequence[Path | Callable[[], bytes]]

    def __len__(self) -> int:
        return len(self.samples)

    def open(self, index: int) -> Image.Image:
        """Decode image ``index`` as RGB.

        Raises:
            ValueError: it is missing, truncated or no image.
        """
        from PIL import Image

        source = self.sources[index]
        try:
            file = source if isinstance(source, Path) else io.BytesIO(source())
            with Image.open(file) as image:
                return image.convert("RGB")
        except Exception as error:  # Pillow's decoders raise whatever their formats make them
            reason = " ".join(str(error).split()) or type(error).__name__
            name = self.samples[index].name
            raise ValueError(f"train: {name} must be a readable image, got: {reason}") from error

    def labels(self) -> list[str]:
        """The different labels, sorted."""
        return sorted({sample.label for sample in self.samples if sample.label is not None})

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the samples, to notice that the data changed; images are not read."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(repr(astuple(sample)[1:]).encode())
            digest.update(Path(sample.name).name.encode())
        return digest.hexdigest()


def read_images(path: Path | str, kind: str, experts: Sequence[str] | None) -> ImageSet:
    """List the images of a data set; none is decoded.

    ``path`` is one of:

    - a folder: ``DOMAIN/LABEL/image.png``, or for text ``DOMAIN/image.png`` with ``image.txt`` beside it, whose first
      line is the question, or instruction, and the rest the answer;
    - a ``.csv`` or ``.jsonl`` manifest with columns ``image`` and ``domain``, and ``label``, or ``prompt`` and
      ``text``, or ``instruction`` and ``text``, which need no ``domain``; images relative to the manifest;
    - a directory that ``datasets.Dataset.save_to_disk`` wrote, with those columns; ``image`` a ``datasets.Image`` or
      a path relative to the directory.

    Args:
        path: where the data is.
        kind: ``label``, ``text`` or ``instruction``.
        experts: the names a domain may have; None for any.

    Raises:
        ValueError: the path is none of these, a column or caption is missing, a domain is empty or is no expert's
            name.
        RuntimeError: the path is a `datasets` directory, and `datasets` is not installed.
    """
    path = Path(path)
    if path.is_file() and path.suffix.lower() in MANIFESTS:
        found = _manifest(path, kind)
    elif path.is_dir() and (path / "dataset_dict.json").is_file():
        raise ValueError(f"train: data must be one split of {path}, a subdirectory, got all of it")
    elif path.is_dir() and all((path / name).is_file() for name in SAVED_DATASET):
        found = _saved_dataset(path, kind)
    elif path.is_dir():
        found = _folder(path, kind, experts)
    else:
        raise ValueError(
            f"train: data must be a folder, a .csv or .jsonl manifest or a datasets directory, got {path}"
        )
    if not len(found):
        raise ValueError(f"train: data must hold at least one image, got none in {path}")
    for sample in found.samples:
        _check_domain(sample.domain, experts, sample.name)
    return found


def domains_of(images: ImageSet) -> list[str]:
    """The different domains, sorted."""
    return sorted({sample.domain for sample in images.samples})


def check_every_domain(images: ImageSet, experts: Sequence[str], path: Path) -> None:
    """Raise ValueError unless there is an image for each expert to learn from but the versatile one, the first."""
    there = {sample.domain for sample in images.samples}
    for name in experts[1:]:
        if name not in there:
            raise ValueError(f"train: data must hold images of domain {name}, got none in {path}")


def check_labels_known(images: ImageSet, classes: Sequence[str], path: Path) -> None:
    """Raise ValueError if an image has a label that is not one of the training data's."""
    known = set(classes)
    for sample in images.samples:
        if sample.label not in known:
            raise ValueError(
                f"train: label of {sample.name} must be one that the training data has, got {sample.label} in {path}"
            )


def _check_domain(domain: str, experts: Sequence[str] | None, where: str | Path) -> None:
    if experts is not None and domain not in experts:
        raise ValueError(
            f"train: domain must be one of {', '.join(experts)}, got {domain} at {where}"
        )


def _folder(root: Path, kind: str, experts: Sequence[str] | None) -> ImageSet:
    samples: list[Sample] = []
    paths: list[Path] = []
    for domain in _subfolders(root):
        _check_domain(domain.name, experts, domain)
        rows = _labelled(domain) if kind == "label" else _captioned(domain, kind)
        before = len(samples)
        for path, sample in rows:
            samples.append(sample)
            paths.append(path)
        if len(samples) == before:
            raise ValueError(f"train: domain must hold images, got none in {domain}")
    return ImageSet(samples, paths)


def _labelled(domain: Path) -> Iterator[tuple[Path, Sample]]:
    loose = _image_files(domain)
    if loose:
        raise ValueError(f"train: image must lie in a folder named as its label, got {loose[0]}")
    for label in _subfolders(domain):
        for path in _image_files(label):
            yield path, Sample(str(path), domain.name, label=label.name)


def _captioned(domain: Path, kind: str) -> Iterator[tuple[Path, Sample]]:
    for path in _image_files(domain):
        caption = path.with_suffix(".txt")
        if not caption.is_file():
            raise ValueError(f"train: image must have a {caption.name} beside it, got {path} alone")
        prompt, _, text = _read_text(caption).replace("\r\n", "\n").partition("\n")
        if not text.strip():
            raise ValueError(
                f"train: caption must have an answer after its first line, got {caption}"
            )
        if kind == "instruction" and not prompt.strip():
            raise ValueError(f"train: caption must begin with an instruction, got {caption}")
        yield path, Sample(str(path), domain.name, prompt=prompt.strip(), text=text.strip())


def _manifest(path: Path, kind: str) -> ImageSet:
    samples, paths = [], []
    for where, row in _csv_rows(path) if path.suffix.lower() == ".csv" else _jsonl_rows(path):
        missing = [name for name in COLUMNS[kind] if row.get(name) is None]
        if missing:
            raise ValueError(f"train: row must have a column {missing[0]}, got {where} without it")
        empty = [name for name in COLUMNS[kind] if not str(row[name]).strip() and name != "prompt"]
        if empty:
            raise ValueError(f"train: {empty[0]} must not be empty, got {where} without one")
        image = path.parent / str(row["image"])
        samples.append(_sample(str(image), row, kind))
        paths.append(image)
    return ImageSet(samples, paths)


def _sample(name: str, row: dict[str, Any], kind: str) -> Sample:
    columns = COLUMNS[kind][1:]
    values = {FIELDS.get(column, column): str(row[column]) for column in columns}
    return Sample(name, **{"domain": str(row.get("domain") or ONE_TASK), **values})


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""))
    for row in reader:
        yield f"{path}:{reader.line_num}", row


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"train: manifest must hold JSON lines, got {path}:{number}: {error}"
            ) from None
        if not isinstance(row, dict):
            raise ValueError(f"train: manifest must hold JSON objects, got {path}:{number}: {row}")
        yield f"{path}:{number}", row


def _read_text(path: Path) -> str:
    """A file's text, without the mark that some programs put before it; its line breaks as they are."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"train: text must be UTF-8, got {path}: {error}") from None


def _saved_dataset(path: Path, kind: str) -> ImageSet:
    if find_spec("datasets") is None:
        raise RuntimeError(
            f'train: datasets must be installed to read {path}: pip install -e ".[train]"'
        )
    import datasets

    table = datasets.load_from_disk(str(path))
    missing = [name for name in COLUMNS[kind] if name not in table.column_names]
    if missing:
        raise ValueError(f"train: dataset must have a column {missing[0]}, got {path} without it")
    if isinstance(table.features["image"], datasets.Image):
        table = table.cast_column("image", datasets.Image(decode=False))
    wanted = [*COLUMNS[kind][1:], *(["domain"] if "domain" in table.column_names else [])]
    columns = {name: table[name][:] for name in dict.fromkeys(wanted)}
    labels = table.features.get("label")
    if isinstance(labels, datasets.ClassLabel) and "label" in columns:
        columns["label"] = labels.int2str(columns["label"])
    rows = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    for i, row in enumerate(rows):
        if kind == "instruction" and not str(row["instruction"] or "").strip():
            raise ValueError(f"train: instruction must not be empty, got {path}[{i}] without one")
    samples = [_sample(f"{path}[{i}]", row, kind) for i, row in enumerate(rows)]
    return ImageSet(samples, [_Cell(table, i, path) for i in range(len(rows))])


@dataclass(frozen=True)
class _Cell:
    """The encoded image of one row of a `datasets` table."""

    table: Any
    row: int
    root: Path

    def __call__(self) -> bytes:
        image = self.table[self.row]["image"]
        if isinstance(image, dict) and image.get("bytes") is not None:
            return image["bytes"]
        return (self.root / (image["path"] if isinstance(image, dict) else image)).read_bytes()


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _image_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
