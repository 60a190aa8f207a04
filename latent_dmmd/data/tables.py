"""Tables of images, read by `datasets`: parquet and arrow files, what `save_to_disk` wrote, and data on the hub."""

import glob
import os
import re
from collections.abc import Container, Iterator
from contextlib import contextmanager

import datasets
from huggingface_hub import constants

from latent_dmmd.data.folders import printable
from latent_dmmd.utils.errors import DataError, one_line
from latent_dmmd.utils.files import nearest_existing, probe

TABLE_SUFFIXES = (".parquet", ".arrow")
Table = datasets.Dataset | datasets.IterableDataset


def table_source(name: str) -> dict | None:
    """What `datasets.load_dataset` is to be given for table files: one, a pattern, or several with commas between.

    Returns None if the name is that of none. Raises DataError if a file is missing or kinds are mixed.
    """
    if os.path.isdir(name):
        return None
    names = [name] if os.path.exists(name) else [part.strip() for part in name.split(",")]
    kinds = {os.path.splitext(part)[1].lower() for part in names}
    if not kinds <= set(TABLE_SUFFIXES):
        return None
    files = []
    for part in names:
        matches = [part] if os.path.exists(part) else sorted(glob.glob(part, recursive=True))
        if not matches:
            raise DataError(f"no file {printable(part)}")
        files += matches
    if len(kinds) > 1:
        raise DataError(f"{printable(name)} mixes parquet and arrow files; give files of one kind")
    # datasets takes file names for patterns
    return dict(path=kinds.pop()[1:], data_files=[glob.escape(file) for file in files])


def folder_source(folder: str, passed_over: Container[str]) -> dict | None:
    """`table_source` of a folder with these suffixes; None if tables are not among them."""
    kinds = [suffix for suffix in TABLE_SUFFIXES if suffix in passed_over]
    # datasets takes the name of a folder for a pattern, and for UTF-8, unless it is given apart
    if kinds and (glob.has_magic(folder) or printable(folder) != folder):
        return dict(path=kinds[0][1:], data_dir=glob.escape(folder))
    return dict(path=folder) if kinds else None


def is_saved_table(folder: str) -> bool:
    """Whether `save_to_disk` of a Dataset or a DatasetDict wrote a folder."""
    marks = [{"dataset_dict.json"}, {"dataset_info.json", "state.json"}]
    return any(all(os.path.isfile(os.path.join(folder, name)) for name in names) for names in marks)


def load_saved_table(folder: str, split: str) -> datasets.Dataset:
    """What `save_to_disk` wrote: a split of a DatasetDict, `train` by default, or a Dataset. Raises DataError if it
    cannot be read or has no such split."""
    with naming_tables(folder, dict(path=folder)):
        saved = datasets.load_from_disk(folder)
    if isinstance(saved, datasets.DatasetDict):
        if (split or "train") not in saved:
            raise DataError(f"{printable(folder)} has no split {split or 'train'!r}; it has {', '.join(saved)}")
        return saved[split or "train"]
    if split:
        raise DataError(f"{printable(folder)} has no splits; leave out :{split}")
    return saved


def load_table(name: str, source: dict, split: str) -> datasets.Dataset:
    """A table from files or the hub. Raises DataError if it cannot be had."""
    with naming_tables(name, source):
        return datasets.load_dataset(**source, split=split)


def stream_table(name: str, source: dict, split: str) -> tuple[datasets.IterableDataset, str]:
    """A table that is read as it comes, and a fingerprint of the files that it reads. Raises DataError if it cannot be
    had."""
    with naming_tables(name, source):
        builder = datasets.load_dataset_builder(**source)
        table = builder.as_streaming_dataset(split=split)
        table = table if table.column_names else table._resolve_features()
    return table, f"{builder.config_id} {builder.hash} {split}"


@contextmanager
def naming_tables(name: str, source: dict) -> Iterator[None]:
    """Context that reads a table. Raises DataError that says whether the cache, the network, or the data are at
    fault."""
    on_hub = source.keys() == {"path"} and not os.path.exists(source["path"])
    shown = printable(source["path"] if on_hub else name)
    if on_hub and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source["path"]):
        raise DataError(f"there is no folder or file {shown}, and data sets on the hub are named OWNER/NAME")
    try:
        yield
    except Exception as error:  # datasets raises a dozen types
        caches = {"HF_DATASETS_CACHE": datasets.config.HF_DATASETS_CACHE}
        if on_hub:
            caches["HF_HUB_CACHE"] = constants.HF_HUB_CACHE
        for variable, folder in caches.items():
            if reason := why_unwritable(str(folder)):
                raise DataError(
                    f"cannot write the cache folder {folder}: {reason}; "
                    f"set HF_HOME or {variable} to a folder that can be written"
                ) from error
        if isinstance(error, datasets.exceptions.DatasetGenerationError):  # which says nothing itself
            error = error.__cause__ or error
        if not on_hub:
            raise DataError(f"cannot read {shown}: {one_line(error)}") from error
        if isinstance(error, datasets.exceptions.DatasetNotFoundError):
            raise DataError(f"there is no folder {shown}, and no data set of this name on the hub") from error
        if isinstance(error, ConnectionError):
            raise DataError(f"there is no folder {shown}, and the hub is out of reach: {one_line(error)}") from error
        raise DataError(f"cannot read {shown} from the hub: {one_line(error)}") from error


def why_unwritable(folder: str) -> str | None:
    """Why no file can be written in a folder, which may be missing; None if one can."""
    try:
        probe(nearest_existing(folder))
    except OSError as error:
        return error.strerror
    return None


def undecoded(table: Table, name: str, image_column: str) -> Table:
    """The column of images alone, as bytes or file names. Raises DataError if there is none."""
    if image_column not in table.column_names:
        raise DataError(f"{printable(name)} has no column {image_column!r}; it has {', '.join(table.column_names)}")
    try:
        return table.select_columns(image_column).cast_column(image_column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise DataError(f"column {image_column!r} of {printable(name)} holds no images: {one_line(error)}") from error


def cell_source(cell: dict | None) -> str | bytes:
    """The file or the bytes that an undecoded cell of images stands for."""
    if cell is None:
        return b""
    return cell["bytes"] if cell["bytes"] is not None else cell["path"]


def read_cell(table: datasets.Dataset, image_column: str, index: int) -> str | bytes:
    """`cell_source` of a row."""
    return cell_source(table[index][image_column])


def label_order(table: datasets.Dataset) -> list[str] | None:
    """The classes in the order that a column `label` declares; None if it declares none."""
    feature = table.features["label"]
    return feature.names if isinstance(feature, datasets.ClassLabel) else None


def column_classes(table: datasets.Dataset, name: str) -> list[str]:
    """The class of each row, by a column `label` of integers, names or a declared ClassLabel.

    Raises:
        DataError: If the column holds anything else, or has no class in some rows.
    """
    feature, values, order = table.features["label"], table["label"][:], label_order(table)
    kind = getattr(feature, "dtype", type(feature).__name__)
    if not (order or re.fullmatch(r"u?int\d+|(large_)?string|null", str(kind))):
        raise DataError(
            f"column 'label' of {printable(name)} holds {kind}, such as {values[0]!r} in row 0; "
            "classes are whole numbers or names"
        )
    missing = [i for i, value in enumerate(values) if value in (None, "") or (order and not 0 <= value < len(order))]
    if missing:
        rows = ", ".join(str(i) for i in missing[:5]) + (", …" if len(missing) > 5 else "")
        raise DataError(
            f"column 'label' of {printable(name)} names no class in {len(missing)} of {len(values)} rows: {rows}"
        )
    return [order[value] if order else str(value) for value in values]
