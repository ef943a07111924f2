"""Three small vision encoders with strengths of their own: each trained here, then frozen.

``clip`` sees an image of 32 x 32 pixels and learns which words its caption has, from its CLS token. ``dino`` sees it at
64 x 64 and learns which shape has its centre in which patch, and where that patch is. ``pix`` sees a page in its own
width and height and learns which large letter lies at each patch.
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
from .data import PATCH, WIDEST, Images, facts
from .pages import LETTERS
from .scenes import CELLS, COLORS, SHAPES, SIDE
from .settings import Settings
from .tasks import CAPTION_WORDS

ENCODERS = ("clip", "dino", "pix")
SEEN = {"clip": ("scene", "chart"), "dino": ("scene",), "pix": ("page",)}  # kinds to train on
THINGS = len(COLORS) * len(SHAPES)
BATCH = 32  # images of each kind a step; clip's are small: twice as many
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
    kinds = SEEN[name]
    captions = {
        kind: caption_targets(kind, "train", seed, len(images[kind].sizes)) for kind in kinds
    }
    batch = images_a_step(name) // len(kinds)
    for _ in range(settings.encoder_steps[ENCODERS.index(name)]):
        losses = []
        for kind in kinds:
            index = rng.integers(0, len(images[kind].sizes), batch)
            logits = _logits(model, head, name, images[kind], index, settings)
            losses.append(_loss(name, logits, images[kind], captions[kind], index))
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        schedule.step()
        progress(batch * len(kinds))
    return model.eval(), head


def images_a_step(name: str) -> int:
    """How many images an encoder sees a step of its own training: clip's are small."""
    return BATCH * len(SEEN[name]) * (1 + (name == "clip"))


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
        return head(hidden[:, 0])
    if name == "dino":
        return head(hidden[:, -(CELLS**2) :]).flatten(0, 1)
    return head(hidden[inputs["attention_mask"].bool()])


def _loss(name: str, logits: Tensor, images: Images, captions: Tensor, index: np.ndarray) -> Tensor:
    if name == "clip":
        return F.binary_cross_entropy_with_logits(logits, captions[index])
    target = targets(images, index)
    weight = torch.where(target > 0, 1.0, 0.2)  # most patches are of nothing
    what = logits[:, : 1 + THINGS] if name == "dino" else logits
    loss = (F.cross_entropy(what, target, reduction="none") * weight).sum() / weight.sum()
    if name == "dino":
        loss = loss + sum(F.cross_entropy(*axis) for axis in _where(logits, target))
    return loss


def _where(logits: Tensor, target: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of dino's patches that show something: logits of their column and row, and the right ones."""
    place = torch.arange(len(target)) % CELLS**2
    shown = target > 0
    column, row = logits[shown, 1 + THINGS :].split(CELLS, 1)
    return [(column, place[shown] % CELLS), (row, place[shown] // CELLS)]


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
        logits = torch.cat(
            [
                _logits(model, head, name, images[kind], part, settings)
                for part in np.array_split(index, 8)
            ]
        )
        if name == "clip":
            right = ((logits > 0) == (caption_targets(kind, "test", seed, len(index)) > 0)).all(1)
        else:
            target = targets(images[kind], index)
            what = logits[:, : 1 + THINGS] if name == "dino" else logits
            right = (what.argmax(1) == target)[target > 0]
            for said, place in _where(logits, target) if name == "dino" else []:
                right &= said.argmax(1) == place
        found[kind] = 100 * float(right.float().mean())
    return found


@torch.no_grad()
def features(name: str, model: Any, images: Images, settings: Settings) -> list[Features]:
    """What a frozen encoder makes of images, a few hundred at a time."""
    encoder, index = Encoder(model), np.arange(len(images.sizes))
    return [
        encoder(**inputs_of(name, images, part, settings))
        for part in np.array_split(index, len(index) // 200 + 1)
    ]
