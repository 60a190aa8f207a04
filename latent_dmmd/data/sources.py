"""Data sets of images: `load_images` turns a name into square RGB images, each of which is right or named."""

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from latent_dmmd.utils.errors import DataError, one_line

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
OnBadImage = Literal["error", "skip"]
Table = datasets.Dataset | datasets.IterableDataset


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


class ImageDataset(Dataset):
    """Images as uint8 tensors of shape (3, R, R), read when asked for.

    Args:
        names: What to call each image.
        read: From an index to a file or to bytes.
        resolution: R.
        fingerprint: Changes whenever the data do.
        classes: Gives the name of each image's class when they are asked for; None if they have none.
        class_order: All names in their order; numbers ascending, then names by the alphabet, if None.
    """

    def __init__(
        self,
        names: list[str],
        read: Callable[[int], str | Path | bytes],
        resolution: int,
        fingerprint: str,
        classes: Callable[[], list[str]] | None = None,
        class_order: list[str] | None = None,
    ) -> None:
        self.names, self.read, self.resolution, self.fingerprint = names, read, resolution, fingerprint
        self.classes, self.class_order = classes, class_order

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self.names):
            raise IndexError(index)
        return read_image(self.read(index), self.resolution, self.names[index])

    def batches(
        self, start: int, count: int, batch_size: int, num_workers: int = 0
    ) -> Iterator[list[tuple[str, Tensor | DataError]]]:
        """Lists of (name, image), or (name, error) where it cannot be read, from `start` on, `count` at most."""
        indices = range(start, min(start + count, len(self)))
        return iter(DataLoader(ImagesOrErrors(self, indices), batch_size, num_workers=num_workers, collate_fn=list))

    def labels(self, skipped: tuple[str, ...] = ()) -> tuple[list[str], Tensor]:
        """Names of the classes in their order, and the class of every image but the skipped, with shape (N).

        Raises DataError if images have no classes, or only one.
        """
        if self.classes is None:
            raise DataError("these images have no classes: use a folder for each class, a column 'label', or elpv")
        left_out = set(skipped)
        kept = [c for name, c in zip(self.names, self.classes()) if name not in left_out]
        found = set(kept)
        if self.class_order is not None:
            names = [name for name in self.class_order if name in found]
        else:
            names = sorted(found, key=lambda name: (0, int(name), "") if name.isdecimal() else (1, 0, name))
        if len(names) < 2:
            raise DataError(f"all images are of one class, {names[0]}")
        return names, torch.tensor([names.index(c) for c in kept], device="cpu")

    def examples(self, count: int, seed: int, skipped: tuple[str, ...] = ()) -> Tensor:
        """Random images, none of the skipped, with shape (count, 3, R, R)."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed), device="cpu").tolist()
        readable = (i for i in order if self.names[i] not in skipped)
        return torch.stack([self[i] for i in islice(readable, count)])


class ImagesOrErrors(Dataset):
    """(name, image) at the given indices, or (name, error) where it cannot be read.

    The error is returned because a DataLoader puts the traceback of its worker into what it raises.
    """

    def __init__(self, images: ImageDataset, indices: range) -> None:
        self.images, self.indices = images, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[str, Tensor | DataError]:
        index = self.indices[i]
        try:
            return self.images.names[index], self.images[index]
        except DataError as error:
            return self.images.names[index], error


class ImageStream:
    """Images that are read in order, as they come, and whose number is known at the end only.

    Args:
        name: What the data are called; images are its numbered items.
        table: The stream, whose cells are not decoded.
        image_column: The column of images.
        resolution: R.
        fingerprint: Changes whenever the data do.
    """

    def __init__(
        self, name: str, table: datasets.IterableDataset, image_column: str, resolution: int, fingerprint: str
    ) -> None:
        self.name, self.table, self.image_column = name, table, image_column
        self.resolution, self.fingerprint = resolution, fingerprint
        self.position, self.rows = 0, iter(table)

    def batches(
        self, start: int, count: int, batch_size: int, num_workers: int = 0
    ) -> Iterator[list[tuple[str, Tensor | DataError]]]:
        """As of `ImageDataset`; reading goes on where it was if that is `start`. Images are decoded here, whatever
        `num_workers`."""
        if start != self.position:
            self.position, self.rows = start, iter(self.table.skip(start))
        for first in range(start, start + count, batch_size):
            rows = list(islice(self.rows, min(batch_size, start + count - first)))
            self.position += len(rows)
            if not rows:
                return
            yield [self.decoded(first + i, row) for i, row in enumerate(rows)]

    def decoded(self, index: int, row: dict) -> tuple[str, Tensor | DataError]:
        name = f"{self.name}[{index}]"
        try:
            return name, read_image(cell_source(row[self.image_column]), self.resolution, name)
        except DataError as error:
            return name, error

    def examples(self, count: int, seed: int, skipped: tuple[str, ...] = ()) -> Tensor:
        """The first images, none of the skipped, with shape (count, 3, R, R)."""
        batches = self.batches(0, count + len(skipped), count)
        images = [item for items in batches for name, item in items if isinstance(item, Tensor)]
        return torch.stack(images[:count])


ImageSource = ImageDataset | ImageStream


def cell_source(cell: dict | None) -> str | bytes:
    """The file or the bytes that an undecoded cell of images stands for."""
    if cell is None:
        return b""
    return cell["bytes"] if cell["bytes"] is not None else cell["path"]


def load_images(
    name_or_path: str, resolution: int = 256, image_column: str = "image", streaming: bool = False
) -> ImageSource:
    """A data set of images by name.

    Images have classes if every one lies in a folder below the given one, whose name is its class; if a table has a
    column `label`; and in `elpv`.

    Args:
        name_or_path: `elpv` or a part of it such as `elpv:train`, see `elpv_files`; a folder of images, searched
            through; a parquet or arrow file; or `name` or `name:split` of a data set on the hub, split `train` by
            default.
        resolution: Side of the images in pixels.
        image_column: The column that holds images, for tables and hub data.
        streaming: Whether tables and hub data are read as they come, without a copy on the disk; images in files are
            never copied.

    Raises:
        DataError: If there is no such data, or it holds no images.
    """
    name, _, split = name_or_path.partition(":")
    if name == "elpv":
        paths = elpv_files(split or "all")
        return images_in_files([str(p) for p in paths], resolution, partial(elpv_classes, paths))
    path = Path(name_or_path)
    if path.is_dir():
        paths = sorted(files_below(str(path)))
        if not paths:
            raise DataError(f"no images in {path}: looked for {', '.join(sorted(IMAGE_SUFFIXES))}")
        below = [os.path.relpath(p, path).split(os.sep) for p in paths]
        sorted_in = all(len(parts) > 1 for parts in below)
        return images_in_files(paths, resolution, (lambda: [parts[0] for parts in below]) if sorted_in else None)
    if path.suffix in (".parquet", ".arrow"):
        if not path.exists():
            raise DataError(f"no file {path}")
        split, source = "train", dict(path=path.suffix[1:], data_files=str(path))
    elif path.is_absolute() or name_or_path.startswith(".") or path.exists():
        raise DataError(f"no folder {path}; give a folder of images, a parquet file, elpv:train, or a hub name")
    else:
        split, source = split or "train", dict(path=name)
    if streaming:
        return streamed_images(name_or_path, source, split, resolution, image_column)
    with naming_tables(name_or_path):
        table = datasets.load_dataset(**source, split=split)
    if not len(table):
        raise DataError(f"no images in {name_or_path}")
    labelled = table
    classes, order = None, None
    if "label" in table.column_names:
        feature = table.features["label"]
        order = feature.names if isinstance(feature, datasets.ClassLabel) else None
        classes = lambda: [order[c] if order else str(c) for c in labelled["label"]]  # noqa: E731
    table = undecoded(table, name_or_path, image_column)
    names = [f"{name_or_path}[{i}]" for i in range(len(table))]
    read = lambda i: cell_source(table[i][image_column])  # noqa: E731
    return ImageDataset(names, read, resolution, table._fingerprint, classes, order)


def streamed_images(name_or_path: str, source: dict, split: str, resolution: int, image_column: str) -> ImageStream:
    """A stream of images. Its fingerprint comes from the files that the stream reads. Raises DataError like
    `load_images`."""
    with naming_tables(name_or_path):
        builder = datasets.load_dataset_builder(**source)
        table = builder.as_streaming_dataset(split=split)
        table = table if table.column_names else table._resolve_features()
    if not table.column_names:
        raise DataError(f"no images in {name_or_path}")
    fingerprint = f"{builder.config_id} {builder.hash} {split}"
    table = undecoded(table, name_or_path, image_column)
    try:  # a stream is cast when it is read
        cell_source(next(iter(table))[image_column])
    except StopIteration:
        raise DataError(f"no images in {name_or_path}") from None
    except Exception as error:  # pyarrow has types of its own
        raise DataError(f"column {image_column!r} of {name_or_path} holds no images: {one_line(error)}") from error
    return ImageStream(name_or_path, table, image_column, resolution, fingerprint)


@contextmanager
def naming_tables(name_or_path: str) -> Iterator[None]:
    """Context that reads a table. Raises DataError if it cannot be had."""
    try:
        yield
    except Exception as error:  # datasets raises a dozen types
        raise DataError(f"{name_or_path} is no folder, and no data set: {one_line(error)}") from error


def undecoded(table: Table, name_or_path: str, image_column: str) -> Table:
    """The column of images alone, as bytes or file names. Raises DataError if there is none."""
    if image_column not in table.column_names:
        raise DataError(f"{name_or_path} has no column {image_column!r}; it has {', '.join(table.column_names)}")
    try:
        return table.select_columns(image_column).cast_column(image_column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise DataError(f"column {image_column!r} of {name_or_path} holds no images: {one_line(error)}") from error


def elpv_files(split: str) -> list[Path]:
    """The photographs of `elpv-dataset` (Buerhop-Lutz et al., 2018), in the order of their numbers.

    Args:
        split: "all"; "heldout", every tenth photograph, on which nothing is chosen; "train", the others; or the two
            parts of "train": "validation", a ninth of it, to choose settings on, and "fit", the rest.

    Raises:
        DataError: If there is no such split, or the photographs are not installed.
    """
    parts = {"heldout": {0}, "validation": {5}}
    parts |= {"all": set(range(10)), "train": set(range(1, 10)), "fit": set(range(1, 10)) - parts["validation"]}
    if split not in parts:
        raise DataError(f"elpv has no split {split!r}; use {', '.join(f'elpv:{name}' for name in parts)}")
    try:
        import elpv_dataset
    except ImportError as error:
        raise DataError('the ELPV photographs are not installed: pip install "latent-dmmd[demo]"') from error
    paths = sorted((Path(elpv_dataset.__file__).parent / "data" / "images").glob("*.png"))
    return [p for i, p in enumerate(paths) if i % 10 in parts[split]]


def elpv_classes(paths: list[Path]) -> list[str]:
    """Classes of photographs of `elpv-dataset`: the kind of silicon, mono or poly, and whether experts gave a defect a
    probability above one half, as in "mono defective" and "poly intact"."""
    lines = (paths[0].parents[1] / "labels.csv").read_text().split("\n")
    known = {file: (float(probability), kind) for file, probability, kind in map(str.split, filter(None, lines))}
    found = [known[f"images/{p.name}"] for p in paths]
    return [f"{kind} {'defective' if probability > 0.5 else 'intact'}" for probability, kind in found]


def files_below(folder: str) -> Iterator[str]:
    """Paths of the images in a folder and all folders below it, dangling links among them."""
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            yield from files_below(entry.path)
        elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES and not os.path.isdir(entry.path):
            yield entry.path


def images_in_files(paths: list[str], resolution: int, classes: Callable[[], list[str]] | None = None) -> ImageDataset:
    """Images in files; the fingerprint covers their names, sizes and times."""
    digest = hashlib.sha256()
    for path in paths:
        # a dangling link is named when it is read
        status = os.stat(path) if os.path.exists(path) else os.lstat(path)
        digest.update(f"{os.path.basename(path)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return ImageDataset(paths, paths.__getitem__, resolution, digest.hexdigest()[:16], classes)
