"""Pictures on disk: PNG files, labelled grids, animations, loss curves."""

import json
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor


def save_pngs(images_uint8: Tensor, folder: str | Path) -> list[Path]:
    """Write pictures (N, 3, H, W) as 00000.png, 00001.png, … into a folder, which is created."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:05d}.png" for i in range(len(images_uint8))]
    for image, path in zip(images_uint8, paths):
        to_pil(image).save(path)
    return paths


def to_pil(image_uint8: Tensor) -> Image.Image:
    """uint8 (3, H, W) to a PIL picture."""
    return Image.fromarray(rearrange(image_uint8, "c h w -> h w c").cpu().numpy())


def labelled_grid(rows: dict[str, Tensor], columns: int = 8, side: int | None = None) -> Image.Image:
    """A grid of pictures with a caption above each block.

    Args:
        rows: Caption to pictures, uint8 with shape (N, 3, H, W); a block takes as many lines as it needs.
        columns: Pictures a line.
        side: Side of each picture in the grid; that of the pictures if None.

    Returns:
        The grid as one picture.
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
            picture = to_pil(image).resize((side, side), Image.Resampling.LANCZOS)
            grid.paste(picture, (side * (i % columns), top + caption + side * (i // columns)))
        top += heights[name]
    return grid


def save_animation(frames: Tensor, path: str | Path, milliseconds: int = 120) -> None:
    """Write an animated WebP that rests on its last frame.

    Args:
        frames: uint8, with shape (F, B, 3, H, W); the B pictures of a frame stand side by side.
        path: The file, .webp.
        milliseconds: Of each frame.
    """
    first, *others = [to_pil(rearrange(frame, "b c h w -> c h (b w)")) for frame in frames]
    durations = [milliseconds] * len(others) + [10 * milliseconds]
    first.save(path, save_all=True, append_images=others, duration=durations, loop=0, quality=80)


def plot_losses(metrics: Path, path: Path) -> None:
    """Curves of every term in a metrics.jsonl, one panel each, over steps."""
    from matplotlib.figure import Figure  # not pyplot, whose backend is the caller's

    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    skipped = ("step", "seconds", "samples_per_second")
    names = [name for name in lines[0] if name not in skipped] if lines else []
    width = 3.6 * max(1, len(names))
    figure = Figure(figsize=(width, 3))
    axes = figure.subplots(1, max(1, len(names)), squeeze=False)
    figure.subplots_adjust(left=0.6 / width, right=1 - 0.15 / width, bottom=0.16, top=0.9, wspace=0.25)
    for axis, name in zip(axes[0], names):
        values = torch.tensor([line.get(name, float("nan")) for line in lines], device="cpu")
        axis.plot([line["step"] for line in lines], values, linewidth=1)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
