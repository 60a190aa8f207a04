"""Decoding one image: read square RGB, an image to edit, or a mask, each right or named."""

import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from latent_dmmd.utils.errors import DataError, one_line


def read_image(source: str | Path | bytes, resolution: int, name: str | None = None) -> Tensor:
    """Decode one image: turned as its EXIF says, transparency on white, shorter side resized, centre cropped.

    Args:
        source: A file, or its bytes.
        resolution: Side of the result in pixels.
        name: What to call it in messages; the file by default.

    Returns:
        RGB as uint8, with shape (3, resolution, resolution).

    Raises:
        DataError: If it is no image, damaged, a decompression bomb, or an eighth of the resolution or smaller.
    """
    name = name or str(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as file:
                image = to_rgb(ImageOps.exif_transpose(file))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"refuse to decode {name}: more than {Image.MAX_IMAGE_PIXELS} pixels") from error
    except UnidentifiedImageError as error:
        raise DataError(f"cannot read {name}: not an image") from error
    except Exception as error:  # a decoder raises whatever a damaged file trips it over
        raise DataError(f"cannot read {name}: {one_line(error)}") from error
    if min(image.size) <= resolution // 8:
        raise DataError(f"{name} is {image.width}x{image.height} pixels, too small for resolution {resolution}")
    image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def open_rgb(path: str | Path) -> Image.Image:
    """An image file of any mode as 8-bit RGB, turned as its EXIF says. Raises OSError if it is no image."""
    with Image.open(path) as file:
        return to_rgb(ImageOps.exif_transpose(file))


def open_mask(path: str | Path) -> Image.Image:
    """A mask file as 8-bit grey, 255 where it selects, turned as its EXIF says.

    A mask selects by its alpha channel if that varies, otherwise by its brightness, above one half. Masks without
    bright pixels, such as those of 0 and 1 or with a dark palette, select where they are not 0.

    Raises:
        OSError: If it is no image.
        ValueError: If it selects nothing.
    """
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
    alpha = np.asarray(image.getchannel("A")) if "A" in image.getbands() else np.zeros(1)
    if alpha.min() != alpha.max():
        selected = alpha > 127
    else:
        brightness = np.asarray(to_rgb(image).convert("L"))
        values = np.asarray(image) if image.mode == "P" else brightness
        selected = brightness > 127 if brightness.max() > 127 else values > 0
    if not selected.any():
        raise ValueError(f"the mask {path} selects nothing: paint white, or opaque, what is to be replaced")
    return Image.fromarray(selected.astype(np.uint8) * 255)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of an image in any mode: the first frame, 16-bit grey scaled, transparency composited on white.

    Raises ValueError for 32-bit pixels, whose range is not known.
    """
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no known range; save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
