"""Sets of images to score: by name, from files of other programs, and into such files.

An `.npz` of samples is what `evaluator.py` of guided-diffusion reads (Dhariwal & Nichol, 2021): `arr_0`, uint8 with
shape (N, H, W, 3).
"""

import warnings
import zipfile
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset

from latent_dmmd.data.sources import ImageDataset, OnBadImage, describe, load_images
from latent_dmmd.utils.errors import DataError, one_line
from latent_dmmd.utils.files import check_writable, write_aside

SAMPLES = "arr_0"  # what guided-diffusion calls them
READING = "EXIF turned, transparency on white, shorter side resized by Pillow's Lanczos, centre crop, 8-bit RGB"
LOOKED_AT = 16  # files whose format is looked up


@dataclass(frozen=True)
class ScoredImages(Dataset):
    """Images, and what the scores should say of them.

    Args:
        images: uint8 RGB with shape (3, H, W) each.
        name: What they are called, None if they have no name.
        preprocessing: How they were read, None if that is not known.
        file_format: Pillow's name of the format of most files, such as PNG or JPEG, or "uncompressed".
        skipped: Names of images that cannot be read and are left out.
        description: What was found under the name, and what was passed over; None if that is not known.
    """

    images: Dataset[Tensor] | Tensor
    name: str | None = None
    preprocessing: str | None = None
    file_format: str | None = None
    skipped: tuple[str, ...] = ()
    description: str | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return self.images[i]

    @property
    def num_images(self) -> int:
        return len(self)


def load_set(
    name_or_path: str,
    resolution: int = 256,
    num_images: int | None = None,
    on_bad_image: OnBadImage = "error",
    generator: torch.Generator | None = None,
    image_column: str = "image",
) -> ScoredImages:
    """A set by its name: what `load_images` takes, or an `.npz` of samples.

    Args:
        name_or_path: The name.
        resolution: Side of the images in pixels.
        num_images: At most so many, drawn at random; all when None.
        on_bad_image: Whether an image that cannot be read is an error when it is needed, or left out.
        generator: Source of the random order.
        image_column: The column that holds images, for tables and hub data.

    Raises:
        DataError: If there is no such set, or it holds no images.
    """
    if is_npz(name_or_path):
        images, format_, description = load_samples(name_or_path, resolution), "uncompressed", None
    else:
        images = load_images(name_or_path, resolution, image_column)
        format_, description = file_format(images), describe(images)
    order, skipped = list(range(len(images))), []
    if num_images is not None:
        order = torch.randperm(len(images), generator=generator, device="cpu").tolist()
    if on_bad_image == "skip":
        order, skipped = readable(images, order, num_images)
    subset = Subset(images, order[:num_images])
    return ScoredImages(subset, name_or_path, READING, format_, tuple(skipped), description)


def readable(images: ImageDataset, order: list[int], num_images: int | None) -> tuple[list[int], list[str]]:
    """The first images in an order that can be read, all or so many, and the names of the others before them."""
    kept, skipped = [], []
    for i in order:
        if len(kept) == num_images:
            break
        try:
            images[i]
        except DataError:
            skipped.append(images.names[i])
        else:
            kept.append(i)
    return kept, skipped


def file_format(images: ImageDataset) -> str | None:
    """Pillow's name of the format of most of some files that are spread over a set; None if none is an image."""
    formats = Counter()
    for i in range(0, len(images), -(-len(images) // LOOKED_AT)):
        source = images.read(i)
        with suppress(Exception), warnings.catch_warnings():  # what cannot be read is named when it is read
            warnings.simplefilter("ignore")
            with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as file:
                formats[file.format] += 1
    return formats.most_common(1)[0][0] if formats else None


def compression_warnings(generated: str | None, reference: str | None) -> list[str]:
    """What to say where one of two sets, by their file formats, is JPEG and the other is not."""
    if None in (generated, reference) or (generated == "JPEG") == (reference == "JPEG"):
        return []
    return [
        f"the reference is {reference}, the generated images are {generated}: Fréchet distances see compression; "
        "compare with scores of the same formats only"
    ]


def is_npz(name: str | Path) -> bool:
    """Whether a set is a file of NumPy arrays."""
    return Path(name).suffix == ".npz"


def check_npz(path: str | Path) -> None:
    """Raise ValueError or OSError unless a file of arrays can be written there, whose name says what it is."""
    if not is_npz(path):
        raise ValueError(f"cannot write {path}: name it FILE.npz, as the files that are read again")
    check_writable(path)


def read_npz(path: str | Path, names: Collection[str]) -> dict[str, np.ndarray]:
    """Those of the named arrays that a file holds. Raises DataError if it is damaged, or holds Python objects."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names if name in file}
    except Exception as error:  # numpy, zipfile and zlib raise a dozen types
        raise DataError(f"cannot read {path}: {one_line(error)}") from error


def npz_names(path: str | Path) -> list[str]:
    """Names of the arrays in a file. Raises DataError if it is no `.npz`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return file.files
    except Exception as error:
        raise DataError(f"cannot read {path}: {one_line(error)}") from error


def load_samples(path: str | Path, resolution: int) -> ImageDataset:
    """The images of an `.npz` of samples, read like files. Raises DataError if it holds none."""
    array = read_npz(path, [SAMPLES]).get(SAMPLES)
    if array is None:
        raise DataError(
            f"{path} holds no {SAMPLES}, uint8 images with shape (N, H, W, 3); it has {', '.join(npz_names(path))}"
        )
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or not array.size:
        raise DataError(
            f"{SAMPLES} of {path} must be uint8 images with shape (N, H, W, 3); it is {array.dtype} {array.shape}"
        )

    def read(i: int) -> bytes:
        file = BytesIO()
        Image.fromarray(array[i]).save(file, "BMP")
        return file.getvalue()

    return ImageDataset([f"{path}[{i}]" for i in range(len(array))], read, resolution, str(path))


def save_samples(images: Dataset[Tensor] | Tensor, path: str | Path) -> None:
    """Write an `.npz` of samples, whole or not at all, one image in memory at a time.

    Args:
        images: uint8 RGB, all of shape (3, H, W).
        path: The file; its folder is made.

    Raises:
        OSError: If it cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (len(images), *images[0].shape[1:], 3)

    def write(aside: Path) -> None:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
        with zipfile.ZipFile(aside, "w") as archive, archive.open(f"{SAMPLES}.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for i in range(len(images)):
                file.write(images[i].permute(1, 2, 0).contiguous().numpy().tobytes())

    write_aside(path, write)
