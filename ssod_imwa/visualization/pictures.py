"""Boxes drawn on images, and sheets of such images.

Images are uint8 (3, H, W) RGB tensors throughout, boxes float (n, 4) x1 y1 x2 y2 in their pixels.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ssod_imwa.engine.checkpoint.atomic import write_output

# Okabe and Ito's palette, which people with color-blindness tell apart; black and the gray for
# crowds are left out. With more classes than colors the colors repeat, the names do not.
PALETTE = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)

Style = Literal["solid", "dashed"]
_STYLES = ("solid", "dashed")
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)


def draw_detections(
    image: torch.Tensor,
    boxes: torch.Tensor,
    labels: torch.Tensor,
    class_names: Sequence[str],
    *,
    scores: torch.Tensor | None = None,
    notes: Sequence[str] | None = None,
    style: Style = "solid",
    min_side: int = 400,
) -> torch.Tensor:
    """A copy of an image with boxes, each with its class name, score and note.

    Small images are enlarged before drawing, so that text is readable and does not hide them; boxes
    are drawn from the lowest to the highest score.

    Args:
        image: uint8 (3, H, W).
        boxes: (n, 4) in pixels of `image`.
        labels: (n,), 0..C-1; picks name and color.
        class_names: names of the C classes.
        scores: (n,) in [0, 1], shown with two decimals; None shows none (ground truth).
        notes: text after each name, such as "difficult".
        style: "solid" for what a model says, "dashed" for ground truth.
        min_side: pixels; an image whose shorter side has fewer is enlarged by a whole factor, but
            to no more than four times as many on its longer side.

    Returns:
        uint8 (3, H', W'), H' = H and W' = W unless enlarged.

    Raises:
        TypeError: the image is not uint8.
        ValueError: a shape or the style is wrong, or numbers of boxes and labels differ.
    """
    _check(image, boxes, labels, style)
    short, long = sorted(image.shape[1:])
    scale = max(1, min(-(-min_side // short), 4 * min_side // long))
    picture = Image.fromarray(image.cpu().permute(1, 2, 0).numpy())
    picture = picture.resize(
        (picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC
    )
    drawing = ImageDraw.Draw(picture)
    # Sizes that are still seen when a sheet of them is shrunk to half, to fit a screen.
    width = max(3, round(min(picture.size) / 160))
    font = _font(max(14, round(min(picture.size) / 28)))
    order = list(range(len(boxes))) if scores is None else torch.argsort(scores).tolist()
    corners = [[float(x) * scale for x in box] for box in boxes]
    colors = [PALETTE[int(label) % len(PALETTE)] for label in labels]
    for i in order:
        _draw_box(drawing, corners[i], colors[i], width=width, style=style)
    for i in order:  # after all boxes, which would cross the text
        parts = [class_names[int(labels[i])]]
        parts += [] if scores is None else [f"{float(scores[i]):.2f}"]
        parts += [notes[i]] if notes is not None and notes[i] else []
        _draw_tag(drawing, " ".join(parts), corners[i], colors[i], font=font, bounds=picture.size)
    return _to_tensor(picture)


def contact_sheet(
    images: Sequence[torch.Tensor],
    captions: Sequence[str],
    *,
    group: int = 1,
    columns: int | None = None,
    cell: int = 480,
) -> torch.Tensor:
    """Images side by side in rows, each shrunk or enlarged to fit a cell, its caption above it.

    Args:
        images: uint8 (3, H, W) of any sizes.
        captions: one per image; long ones are wrapped.
        group: so many successive images belong together: they stay in one row, and apart from the
            next group.
        columns: groups in a row; None takes the number that makes the sheet most nearly square.
        cell: pixels, longer side of an image on the sheet.

    Returns:
        uint8 (3, H, W), white where there is no image.

    Raises:
        ValueError: there are no images, not as many captions as images, or the last group is not
            full.
    """
    if not images or len(images) != len(captions):
        raise ValueError(f"{len(images)} images with {len(captions)} captions make no sheet")
    if len(images) % group:
        raise ValueError(f"{len(images)} images make no groups of {group} (must be a multiple)")
    font = _font(max(12, cell // 26))
    letters = max(8, int(cell / font.getlength("n")))
    texts = ["\n".join(textwrap.wrap(caption, letters)) for caption in captions]
    line = sum(font.getmetrics())
    above = [(text.count("\n") + 1) * line + cell // 40 for text in texts]
    pictures = [_fit(image, cell) for image in images]
    heights = [picture.height for picture in pictures]
    counts = range(1, len(images) // group + 1) if columns is None else [columns]
    layouts = [_Layout(above, heights, group=group, columns=n, cell=cell) for n in counts]
    layout = min(layouts, key=lambda layout: abs(math.log(layout.width / layout.height)))
    sheet = Image.new("RGB", (layout.width, layout.height), _WHITE)
    drawing = ImageDraw.Draw(sheet)
    for picture, text, (left, top, below_text) in zip(pictures, texts, layout.places, strict=True):
        drawing.multiline_text((left, top), text, fill=_BLACK, font=font, spacing=0)
        sheet.paste(picture, (left, below_text))
    return _to_tensor(sheet)


class _Layout:
    """Where images lie on a sheet with a number of groups in a row.

    Attributes:
        width, height: of the sheet in pixels.
        places: of each image its left edge, the top of its caption, and its own top.
    """

    def __init__(
        self, above: Sequence[int], heights: Sequence[int], *, group: int, columns: int, cell: int
    ) -> None:
        gap = cell // 40
        between = 4 * gap if group > 1 else gap  # groups
        in_row = group * columns
        self.places: list[tuple[int, int, int]] = []
        top = gap
        for start in range(0, len(heights), in_row):
            row = range(start, min(start + in_row, len(heights)))
            text = max(above[i] for i in row)
            for place in range(len(row)):
                left = gap + place * (cell + gap) + place // group * (between - gap)
                self.places.append((left, top, top + text))
            top += text + max(heights[i] for i in row) + between
        self.height = top - between + gap
        self.width = max(left for left, _, _ in self.places) + cell + gap


def save_png(path: str | Path, image: torch.Tensor) -> None:
    """Write an image, making its directory if need be.

    Raises:
        OutputError: it cannot be written.
    """
    buffer = io.BytesIO()
    Image.fromarray(image.cpu().permute(1, 2, 0).numpy()).save(buffer, format="PNG")
    write_output(Path(path), buffer.getvalue())


def _check(image: torch.Tensor, boxes: torch.Tensor, labels: torch.Tensor, style: str) -> None:
    if image.dtype != torch.uint8:
        raise TypeError(f"image has dtype {image.dtype} (must be uint8)")
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"image has shape {tuple(image.shape)} (must be (3, H, W))")
    if boxes.shape != (len(labels), 4):
        raise ValueError(f"boxes have shape {tuple(boxes.shape)} (must be ({len(labels)}, 4))")
    if style not in _STYLES:
        raise ValueError(f"style = {style!r} is not allowed (must be one of {_STYLES})")


def _draw_box(
    drawing: ImageDraw.ImageDraw,
    corners: Sequence[float],
    color: tuple[int, int, int],
    *,
    width: int,
    style: Style,
) -> None:
    x1, y1, x2, y2 = corners
    x2, y2 = max(x1, x2), max(y1, y2)
    # A dark rim keeps the line visible on a background of its own color.
    drawing.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=_BLACK, width=width + 2)
    if style == "solid":
        drawing.rectangle((x1, y1, x2, y2), outline=color, width=width)
        return
    dash = 4 * width
    for y in (y1, y2 - width + 1):
        for x in np.arange(x1, x2, 2 * dash):
            drawing.rectangle((x, y, min(x + dash, x2), y + width - 1), fill=color)
    for x in (x1, x2 - width + 1):
        for y in np.arange(y1, y2, 2 * dash):
            drawing.rectangle((x, y, x + width - 1, min(y + dash, y2)), fill=color)


def _draw_tag(
    drawing: ImageDraw.ImageDraw,
    text: str,
    corners: Sequence[float],
    color: tuple[int, int, int],
    *,
    font: ImageFont.FreeTypeFont,
    bounds: tuple[int, int],
) -> None:
    """Text on a plate of the box's color, above the box or, at the upper edge, inside it."""
    width, height = font.getlength(text) + 4, sum(font.getmetrics()) + 1
    x = min(max(corners[0], 0), max(bounds[0] - width, 0))
    y = corners[1] - height if corners[1] >= height else max(corners[1], 0)
    drawing.rectangle((x, y, x + width, y + height), fill=color)
    bright = np.dot(color, (0.299, 0.587, 0.114)) > 110  # luma of Rec. 601
    drawing.text((x + 2, y), text, fill=_BLACK if bright else _WHITE, font=font)


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # the other kind has no sizes
    return font


def _fit(image: torch.Tensor, cell: int) -> Image.Image:
    picture = Image.fromarray(image.cpu().permute(1, 2, 0).numpy())
    scale = cell / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS)


def _to_tensor(picture: Image.Image) -> torch.Tensor:
    # copy: PIL's buffer is read-only.
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
