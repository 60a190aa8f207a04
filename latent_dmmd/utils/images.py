"""Images on disk: PNG files, labelled grids, animations, loss curves."""

from collections.abc import Iterable
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor

from latent_dmmd.utils.files import write_aside


def save_pngs(images: Iterable[Image.Image], folder: str | Path) -> None:
    """Write images as 00000.png, 00001.png, … into a folder, which is made."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        image.save(folder / f"{i:05d}.png")


def save_image(image: Image.Image, path: str | Path, **options) -> None:
    """Write an image in the format of its suffix, whole or not at all, into a folder that is made.

    Args:
        image: The image.
        path: The file.
        options: Of Pillow's `save`.

    Raises:
        OSError: If it cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, lambda aside: image.save(aside, Image.registered_extensions()[path.suffix], **options))


def to_pil(image_uint8: Tensor) -> Image.Image:
    """uint8 (3, H, W) to a PIL image."""
    return Image.fromarray(rearrange(image_uint8, "c h w -> h w c").cpu().numpy())


def labelled_grid(rows: dict[str, Tensor], columns: int = 8, side: int | None = None) -> Image.Image:
    """A grid of images with a caption above each block.

    Args:
        rows: Caption to images, uint8 with shape (N, 3, H, W); a block takes as many lines as it needs.
        columns: Images per line.
        side: Side of each image in the grid; the images' own if None.

    Returns:
        The grid as one image.
    """
    side = side or next(iter(rows.values())).shape[-1]
    caption = max(18, side // 10)
    heights = {name: caption + side * -(-len(images) // columns) for name, images in rows.items()}
    grid = Image.new("RGB", (side * columns, sum(heights.values())), "white")
    draw = ImageDraw.Draw(grid)
    top = 0
    for name, images in rows.items():
        draw.text((4, top + caption // 8), name, fill="black", font_size=0.7 * caption)
        for i, image in enumerate(images):
            tile = to_pil(image).resize((side, side), Image.Resampling.LANCZOS)
            grid.paste(tile, (side * (i % columns), top + caption + side * (i // columns)))
        top += heights[name]
    return grid


def save_animation(frames: Tensor, path: str | Path, milliseconds: int = 120) -> None:
    """Write an animated WebP that rests on its last frame, whole or not at all.

    Args:
        frames: uint8, with shape (F, B, 3, H, W); the B images of a frame stand side by side.
        path: The file, .webp.
        milliseconds: Of each frame.
    """
    first, *others = [to_pil(rearrange(frame, "b c h w -> c h (b w)")) for frame in frames]
    durations = [milliseconds] * len(others) + [10 * milliseconds]
    save_image(first, path, save_all=True, append_images=others, duration=durations, loop=0, quality=80)


def to_pixels(images_uint8: Tensor) -> Tensor:
    """uint8 in [0, 255] to float32 in [-1, 1]."""
    return images_uint8.float() / 127.5 - 1


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1], clamped, to uint8 in [0, 255]."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
