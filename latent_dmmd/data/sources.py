"""Data sets of images: `load_images` turns a name into square RGB images, each of which is right or named."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Literal

import datasets
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from latent_dmmd.data.elpv import elpv_classes, elpv_files
from latent_dmmd.data.folders import Found, ZipArchive, classes_by_folder, find_images, image_suffixes, printable
from latent_dmmd.data.images import read_image
from latent_dmmd.data.openmoji import openmoji_images
from latent_dmmd.data.tables import (
    cell_source,
    column_classes,
    folder_source,
    is_saved_table,
    label_order,
    load_saved_table,
    load_table,
    read_cell,
    stream_table,
    table_source,
    undecoded,
)
from latent_dmmd.utils.errors import DataError, one_line

OnBadImage = Literal["error", "skip"]
ARCHIVES = (".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
INSTALLED = {"elpv", "openmoji"}  # data sets that are packages
KINDS = "a folder of images, a .zip of them, .parquet or .arrow files, elpv:train, openmoji:train, or a name on the hub"
NUM_LISTED = 10
UNCOUNTED = {"hidden", "reached twice", "without a suffix"}


class ImageDataset(Dataset):
    """Images as uint8 tensors of shape (3, R, R), read when asked for.

    Args:
        names: What to call each image.
        read: From an index to a file or to bytes.
        resolution: R.
        fingerprint: Changes whenever the data do.
        classes: Gives the name of each image's class when they are asked for; None if they have none.
        class_order: All names in their order; numbers ascending, then names by the alphabet, if None.
        name: What the data are called.
        passed_over: Why files beside the images were left out, and how many.
    """

    def __init__(
        self,
        names: list[str],
        read: Callable[[int], str | Path | bytes],
        resolution: int,
        fingerprint: str,
        classes: Callable[[], list[str]] | None = None,
        class_order: list[str] | None = None,
        name: str = "",
        passed_over: Counter[str] | None = None,
    ) -> None:
        self.names, self.read, self.resolution, self.fingerprint = names, read, resolution, fingerprint
        self.classes, self.class_order = classes, class_order
        self.name, self.passed_over = name, +(passed_over or Counter())

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
        left_out = set(skipped)
        kept = [c for name, c in zip(self.names, self.image_classes) if name not in left_out]
        found = set(kept)
        if self.class_order is not None:
            names = [name for name in self.class_order if name in found]
        else:
            names = sorted(found, key=lambda name: (0, int(name), name) if is_number(name) else (1, 0, name))
        if len(names) < 2:
            raise DataError(f"all images are of one class, {', '.join(names)}")
        index = {name: i for i, name in enumerate(names)}
        return names, torch.tensor([index[c] for c in kept], device="cpu")

    @cached_property
    def image_classes(self) -> list[str]:
        """Name of the class of each image. Raises DataError if images have no classes."""
        if self.classes is None:
            raise DataError("these images have no classes: use a folder for each class, a column 'label', or elpv")
        return self.classes()

    def examples(self, count: int, seed: int, skipped: tuple = (), on_bad_image: OnBadImage = "error") -> Tensor:
        """Random images, none of the skipped, with shape (count, 3, R, R).

        Raises DataError for an image that cannot be read, or with `on_bad_image` "skip" if none can.
        """
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed), device="cpu").tolist()
        found = list(islice(self.readable((i for i in order if self.names[i] not in skipped), on_bad_image), count))
        if not found:
            raise DataError(f"no image of {printable(self.name)} can be read")
        return torch.stack(found)

    def readable(self, indices: Iterable[int], on_bad_image: OnBadImage) -> Iterator[Tensor]:
        """The images at these indices. Raises DataError for one that cannot be read, unless these are skipped."""
        for i in indices:
            try:
                yield self[i]
            except DataError:
                if on_bad_image == "error":
                    raise


def is_number(name: str) -> bool:
    return re.fullmatch(r"-?[0-9]+", name) is not None


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
        self.position, self.rows = None, None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "position": None, "rows": None}  # other processes begin to read for themselves

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
        name = f"{printable(self.name)}[{index}]"
        try:
            return name, read_image(cell_source(row[self.image_column]), self.resolution, name)
        except DataError as error:
            return name, error

    def examples(self, count: int, seed: int, skipped: tuple = (), on_bad_image: OnBadImage = "error") -> Tensor:
        """The first images that can be read, none of the skipped, with shape (count, 3, R, R)."""
        batches = self.batches(0, count + len(skipped), count)
        images = [item for items in batches for name, item in items if isinstance(item, Tensor)]
        return torch.stack(images[:count])


ImageSource = ImageDataset | ImageStream


def load_images(
    name_or_path: str,
    resolution: int = 256,
    image_column: str = "image",
    streaming: bool = False,
    keep_rendered: bool = True,
) -> ImageSource:
    """A data set of images by name; what is on the disk goes before the hub.

    Images have classes if every one lies in a folder below the given one, whose name is its class; if a table has a
    column `label`; and in `elpv`.

    Args:
        name_or_path: `elpv` or `openmoji`, or a part such as `elpv:train`, see `elpv_files` and `openmoji_files`; a
            folder or a zip archive of images, searched through, or `folder:split`; parquet or arrow files, as one file,
            a pattern, a list with commas, or a folder with its splits; a folder that `save_to_disk` wrote; or `name` or
            `name:split` of a data set on the hub. The split is `train` by default.
        resolution: Side of the images in pixels.
        image_column: The column that holds images, for tables and hub data.
        streaming: Whether tables and hub data are read as they come, without a copy on the disk; images in files are
            never copied.
        keep_rendered: Whether drawings of `openmoji` are rendered into the cache, or again whenever they are read.

    Raises:
        DataError: If there is no such data, it holds no images, or it holds several splits.
        OSError: If drawings of `openmoji` cannot be kept in the cache.
    """
    name, split = name_and_split(name_or_path)
    if name == "elpv":
        paths = elpv_files(split or "all")
        found = Found(str(paths[0].parent), [str(p) for p in paths])
        return images_in_files(name_or_path, found, resolution, partial(elpv_classes, paths))
    if name == "openmoji":
        return ImageDataset(*openmoji_images(split or "all", resolution, keep_rendered), name=name_or_path)
    options = dict(resolution=resolution, image_column=image_column)
    if source := table_source(name):
        return images_in_table(name_or_path, source, split or "train", streaming, **options)
    if os.path.isdir(name):
        if is_saved_table(name):
            return images_in_rows(name_or_path, load_saved_table(name, split), **options)
        inside = str(Path(name, split))
        found = find_images(inside if os.path.isdir(inside) else name)
        if not found.paths and (source := folder_source(name, found.passed_over)):
            return images_in_table(name_or_path, source, split or "train", streaming, **options)
        if not os.path.isdir(inside):
            raise DataError(f"there is no folder {printable(inside)}")
        return images_in_files(name_or_path, found, resolution)
    if os.path.isfile(name) and name.lower().endswith(".zip"):
        archive = ZipArchive(name)
        found = find_images(os.path.join(name, split) if split else name, archive.listing)
        return images_in_files(name_or_path, found, resolution, archive=archive)
    refuse_other_files(name)
    return images_in_table(name_or_path, dict(path=name), split or "train", streaming, **options)


def name_and_split(name_or_path: str) -> tuple[str, str]:
    """The longest part before a colon that exists on the disk, and what follows; the first part if none exists."""
    name, _, split = name_or_path.partition(":")
    if name in INSTALLED and not (split and os.path.exists(name_or_path)):
        return name, split
    for end in [len(name_or_path), *(i for i, c in reversed(list(enumerate(name_or_path))) if c == ":")]:
        if os.path.exists(name_or_path[:end]):
            return name_or_path[:end], name_or_path[end + 1 :]
    if split.startswith(("/", "\\")):  # a URL or a drive
        return name_or_path, ""
    return name, split


def refuse_other_files(name: str) -> None:
    """Raise DataError for a name that is no data set's on the hub: that of a file, or of a path that is missing."""
    shown, suffix = printable(name), os.path.splitext(name)[1].lower()
    if os.path.exists(name):
        if suffix in ARCHIVES:
            raise DataError(f"{shown} is an archive that cannot be read in place: unpack it and give the folder")
        if suffix in image_suffixes():
            raise DataError(f"{shown} is one image; give the folder that holds the images")
        raise DataError(f"{shown} is no data set; give {KINDS}")
    if not name or os.path.isabs(name) or name.startswith((".", "~")) or any(c in name for c in "*?"):
        raise DataError(f"there is no folder or file {shown or repr(name)}; give {KINDS}")


def no_images(found: Found) -> DataError:
    """The error that names what there is instead."""
    passed = f"; {passed_over(found.passed_over)}" if found.passed_over else ""
    hint = "; unpack archives" if found.passed_over.keys() & {".zip", *ARCHIVES} else ""
    return DataError(f"no images in {printable(found.root)}, such as .png, .jpg or .webp{passed}{hint}")


def images_in_files(
    name: str,
    found: Found,
    resolution: int,
    classes: Callable[[], list[str]] | None = None,
    archive: ZipArchive | None = None,
) -> ImageDataset:
    """Images in files or in an archive; the fingerprint covers their names and sizes, and their times or checksums.

    Classes are those of the folders unless they are given. Raises DataError if there are no images.
    """
    if not found.paths:
        raise no_images(found)
    if classes is None and (by_folder := classes_by_folder(found)) is not None:
        classes = by_folder.copy  # a method of a list, which other processes can be sent
    digest = hashlib.sha256()
    for path in found.paths:
        if archive:
            state = f"{archive.members[path].file_size} {archive.members[path].CRC}"
        else:
            status = os.stat(path)
            state = f"{status.st_size} {status.st_mtime_ns}"
        digest.update(os.fsencode(f"{os.path.basename(path)} {state}\n"))
    read = partial(read_path, found.paths, archive)
    names = [printable(path) for path in found.paths]
    return ImageDataset(
        names, read, resolution, digest.hexdigest()[:16], classes, name=name, passed_over=found.passed_over
    )


def read_path(paths: list[str], archive: ZipArchive | None, index: int) -> str | bytes:
    """A file, or its bytes in an archive."""
    return archive.read(paths[index]) if archive else paths[index]


def images_in_table(
    name: str, source: dict, split: str, streaming: bool, resolution: int, image_column: str
) -> ImageSource:
    """Images of table files or of the hub. Raises DataError like `load_images`."""
    if not streaming:
        return images_in_rows(name, load_table(name, source, split), resolution, image_column)
    table, fingerprint = stream_table(name, source, split)
    if not table.column_names:
        raise DataError(f"no images in {printable(name)}")
    table = undecoded(table, name, image_column)
    try:  # a stream is cast when it is read
        cell_source(next(iter(table))[image_column])
    except StopIteration:
        raise DataError(f"no images in {printable(name)}") from None
    except Exception as error:  # pyarrow has types of its own
        raise DataError(f"column {image_column!r} of {printable(name)} holds no images: {one_line(error)}") from error
    return ImageStream(name, table, image_column, resolution, fingerprint)


def images_in_rows(name: str, table: datasets.Dataset, resolution: int, image_column: str) -> ImageDataset:
    """Images in the rows of a table. Raises DataError if there are none."""
    if not len(table):
        raise DataError(f"no images in {printable(name)}")
    classes, order = None, None
    if "label" in table.column_names:
        classes, order = partial(column_classes, table.select_columns("label"), name), label_order(table)
    table = undecoded(table, name, image_column)
    names = [f"{printable(name)}[{i}]" for i in range(len(table))]
    read = partial(read_cell, table, image_column)
    return ImageDataset(names, read, resolution, table._fingerprint, classes, order, name)


def describe(source: ImageSource) -> str:
    """Lines that say what data there are: how many images, their classes, and what was passed over and why."""
    if isinstance(source, ImageStream):
        return f"data: images of {printable(source.name)}, as they come"
    lines = [f"data: {counted(len(source), 'image')} of {printable(source.name)}"]
    try:
        names, labels = source.labels()
    except DataError:  # none, or none that can be used, which matters only if classes are asked for
        names = []
    if names:
        counts = labels.bincount().tolist()
        listed = [f"{printable(name)} {count}" for name, count in zip(names, counts)][:NUM_LISTED]
        if len(names) > NUM_LISTED:
            listed.append(f"and {len(names) - NUM_LISTED} more, of {min(counts)} to {max(counts)} images each")
        lines.append(f"{len(names)} classes: {', '.join(listed)}")
    if source.passed_over:
        lines.append(passed_over(source.passed_over))
    return "\n".join(lines)


def passed_over(reasons: Counter[str]) -> str:
    """As in "passed over 3 other files: 2 .txt, 1 hidden"."""
    common = reasons.most_common(NUM_LISTED)
    listed = [
        f"{number} {reason}" if reason in UNCOUNTED or reason[0] == "." else counted(number, reason)
        for reason, number in common
    ]
    if len(reasons) > len(common):
        listed.append(f"{reasons.total() - sum(number for _, number in common)} more")
    return f"passed over {counted(reasons.total(), 'other file')}: {', '.join(listed)}"


def counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
