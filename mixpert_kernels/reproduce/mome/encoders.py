"""Three small vision encoders with strengths of their own: each trained here, then frozen.

``clip`` sees an image of 32 x 32 pixels and learns which words its caption has, from its CLS token, and from the mean
of its patches. ``dino`` sees it at 64 x 64 and learns which shape is at a patch, and in which patch its centre is.
``pix`` sees an image in its own width and height and learns which large letter is at a patch. ``dino`` and ``pix`` see
some images of other kinds too, on which there is nothing for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixpert_kernels.hf.mome import Encoder
from mixpert_kernels.hf.random_models import random_clip, random_dinov2, random_pix2struct
from mixpert_kernels.modules.move import Features

from ..training import MAX_NORM, warm_cosine
from .data import PATCH, WIDEST, Images, decode, facts
from .pages import LETTERS
from .scenes import CELLS, COLORS, SHAPES, SIDE
from .settings import Settings
from .tasks import CAPTION_WORDS, KINDS

ENCODERS = ("clip", "dino", "pix")
SEEN = {"clip": ("scene", "chart"), "dino": ("scene",), "pix": ("page",)}  # kinds to learn from
THINGS = len(COLORS) * len(SHAPES)
BATCH = 32  # images of each kind a step; clip's are small: twice as many
OTHERS = 8  # images a step of each kind on which an encoder is to see nothing
Progress = Callable[[int], None]


def new_encoder(name: str, settings: Settings) -> Any:
    """A transformers model with random weights."""
    sizes = {
        "hidden": settings.encoder,
        "layers": settings.encoder_layers,
        "heads": settings.heads,
        "patch_size": PATCH,
    }
    if name == "clip":
        return random_clip(image_size=PATCH * settings.size, **sizes)
    if name == "dino":
        return random_dinov2(image_size=SIDE, **sizes)
    return random_pix2struct(side=WIDEST, **sizes)


def inputs_of(
    name: str, images: Images, index: np.ndarray, settings: Settings
) -> dict[str, Tensor]:
    """What an encoder takes of some of the images."""
    if name == "pix":
        return _flattened(images.native[index], images.sizes[index])
    pixels = torch.from_numpy(images.square[index]).permute(0, 3, 1, 2).float()
    if name == "clip":
        pixels = F.avg_pool2d(pixels, SIDE // (PATCH * settings.size))
    return {"pixel_values": pixels.div_(127.5).sub_(1)}


def _flattened(native: np.ndarray, sizes: np.ndarray) -> dict[str, Tensor]:
    """Pix2Struct's patches: row and column from 1, then the pixels; and which of them are an image's own."""
    b, height, width, _ = native.shape
    rows, columns = height // PATCH, width // PATCH
    pixels = torch.from_numpy(native).view(b, rows, PATCH, columns, PATCH, 3).transpose(2, 3)
    patches = pixels.reshape(b, rows * columns, -1).float().div_(127.5).sub_(1)
    grid = torch.cartesian_prod(torch.arange(1, rows + 1), torch.arange(1, columns + 1))
    h, w = torch.from_numpy(sizes)[:, :, None].unbind(1)
    own = (grid[:, 0] <= h) & (grid[:, 1] <= w)  # (B, S)
    order = (~own).to(torch.uint8).argsort(dim=1, stable=True)[:, : int((h * w).max())]
    both = torch.cat([grid.expand(b, -1, -1).float(), patches], 2)
    mask = own.gather(1, order)
    both = both.gather(1, order[..., None].expand(-1, -1, both.shape[2])) * mask[..., None]
    return {"flattened_patches": both, "attention_mask": mask.float()}


def train_encoder(
    name: str, images: dict[str, Images], seed: int, settings: Settings, progress: Progress
) -> tuple[Any, nn.Linear]:
    """Train an encoder on its own task, with a linear head that is not kept.

    Args:
        name: of ``ENCODERS``.
        images: to train on, by kind.
        seed: of weights, of the order, and of the images.
        settings: sizes and lengths.
        progress: is told how many images were trained on.
    """
    torch.manual_seed(100 * seed + ENCODERS.index(name))
    model = new_encoder(name, settings).train()
    head = nn.Linear(settings.encoder, _labels(name))
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.encoder_rate, weight_decay=settings.decay, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, warm_cosine(settings.encoder_steps[ENCODERS.index(name)])
    )
    rng = np.random.default_rng((seed, ENCODERS.index(name)))
    counts = images_by_kind(name)
    captions = {
        kind: caption_targets(kind, "train", seed, len(images[kind].sizes)) for kind in counts
    }
    for _ in range(settings.encoder_steps[ENCODERS.index(name)]):
        losses = []
        for kind, count in counts.items():
            index = rng.integers(0, len(images[kind].sizes), count)
            logits = _logits(model, head, name, images[kind], index, settings)
            if kind in SEEN[name]:
                losses.append(_loss(name, logits, images[kind], captions[kind], index))
            else:
                losses.append(F.cross_entropy(_what(name, logits), torch.zeros(len(logits)).long()))
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        schedule.step()
        progress(sum(counts.values()))
    return model.eval(), head


def images_by_kind(name: str) -> dict[str, int]:
    """How many images of each kind an encoder sees a step of its own training."""
    if name == "clip":
        return {kind: 2 * BATCH for kind in SEEN[name]}
    return {kind: BATCH if kind in SEEN[name] else OTHERS for kind in KINDS}


def _labels(name: str) -> int:
    """Outputs of its head: words; nothing or a thing, then columns, then rows; nothing or a letter."""
    if name == "clip":
        return len(CAPTION_WORDS)
    return 1 + THINGS + 2 * CELLS if name == "dino" else 1 + len(LETTERS)


def caption_targets(kind: str, split: str, seed: int, count: int) -> Tensor:
    """Which words the captions of a part's images have: (N, words) float32."""
    said = [facts(kind, split, seed, i).caption() for i in range(count)]
    return torch.tensor([[float(word in words) for word in CAPTION_WORDS] for words in said])


def _logits(
    model: Any,
    head: nn.Linear,
    name: str,
    images: Images,
    index: np.ndarray,
    settings: Settings,
) -> Tensor:
    inputs = inputs_of(name, images, index, settings)
    hidden = model(**inputs).last_hidden_state
    if name == "clip":
        return head(torch.stack([hidden[:, 0], hidden[:, 1:].mean(1)]))  # (2, B, words)
    if name == "dino":
        return head(hidden[:, -(CELLS**2) :]).flatten(0, 1)
    return head(hidden[inputs["attention_mask"].bool()])


def _loss(name: str, logits: Tensor, images: Images, captions: Tensor, index: np.ndarray) -> Tensor:
    if name == "clip":
        return F.binary_cross_entropy_with_logits(logits, captions[index].expand_as(logits))
    target = targets(images, index)
    shown = target > 0
    weight = torch.where(shown, 1.0, 0.2)  # most patches are of nothing
    what, *where = _sought(name, target)
    loss = F.cross_entropy(_what(name, logits), what, reduction="none")
    places = zip(_where(logits[shown]), where, strict=False)
    return (loss * weight).sum() / weight.sum() + sum(F.cross_entropy(*pair) for pair in places)


def _what(name: str, logits: Tensor) -> Tensor:
    """The logits of what is at a patch."""
    return logits[:, : 1 + THINGS] if name == "dino" else logits


def _where(logits: Tensor) -> tuple[Tensor, ...]:
    """dino's logits of the row and the column of a thing's centre."""
    return logits[:, 1 + THINGS :].split(CELLS, 1)


def _sought(name: str, target: Tensor) -> list[Tensor]:
    """What is at each patch, 0 for nothing; of dino also the row and the column, where there is something."""
    if name == "pix":
        return [target]
    what, row, column = decode(target)
    shown = target > 0
    return [torch.where(shown, 1 + what, 0), row[shown], column[shown]]


def targets(images: Images, index: np.ndarray) -> Tensor:
    """The targets of the patches that some images have, packed: (R,) int64."""
    pairs = zip(images.target[index], images.sizes[index], strict=True)
    return torch.from_numpy(np.concatenate([t[:h, :w].ravel() for t, (h, w) in pairs]))


@torch.no_grad()
def measure(
    name: str,
    model: Any,
    head: nn.Linear,
    images: dict[str, Images],
    seed: int,
    settings: Settings,
) -> dict[str, float]:
    """How well an encoder does what it was trained for, by kind of image.

    Percent of the test images with every word of the caption right (clip), or of their patches that show something.
    """
    found = {}
    for kind in SEEN[name]:
        index = np.arange(len(images[kind].sizes))
        parts = np.array_split(index, 8)
        logits = [_logits(model, head, name, images[kind], part, settings) for part in parts]
        if name == "clip":
            said = torch.cat([of_part[0] for of_part in logits]) > 0
            right = (said == (caption_targets(kind, "test", seed, len(index)) > 0)).all(1)
        else:
            right = _right(name, torch.cat(logits), targets(images[kind], index))
        found[kind] = 100 * float(right.float().mean())
    return found


def _right(name: str, logits: Tensor, target: Tensor) -> Tensor:
    """Of the patches that show something, which are told right."""
    shown = target > 0
    what, *where = _sought(name, target)
    right = _what(name, logits).argmax(1)[shown] == what[shown]
    for said, place in zip(_where(logits[shown]), where, strict=False):
        right &= said.argmax(1) == place
    return right


@torch.no_grad()
def features(name: str, model: Any, images: Images, settings: Settings) -> list[Features]:
    """What a frozen encoder makes of images, a few hundred at a time."""
    encoder, index = Encoder(model), np.arange(len(images.sizes))
    return [
        encoder(**inputs_of(name, images, part, settings))
        for part in np.array_split(index, len(index) // 200 + 1)
    ]
