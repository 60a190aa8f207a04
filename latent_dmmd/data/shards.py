"""Caches on the disk: a manifest that names all they depend on, and images in shards, each written once and whole."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from latent_dmmd.data.folders import printable
from latent_dmmd.data.sources import ImageSource, OnBadImage
from latent_dmmd.utils.errors import DataError, one_line
from latent_dmmd.utils.files import (
    changed_keys,
    check_folder,
    default_cache_dir,
    is_empty,
    is_utf8,
    write_aside,
    write_json,
)
from latent_dmmd.utils.process import kept_state

SHARD_SIZE = 512  # images in one file
SKIP_HINT = "pass --data.on_bad_image skip to leave out images that cannot be read"
# from `batches` and `progress`, tensors and metadata of a shard, and the number of images read for it
Encode = Callable[..., tuple[dict[str, Tensor], dict[str, str], int]]


def readable(
    items: list[tuple[str, Tensor | DataError]], on_bad_image: OnBadImage, skipped: list[str]
) -> dict[str, Tensor]:
    """Images by name; names of those that cannot be read are added to `skipped`, or the first is raised."""
    bad = {name: error for name, error in items if isinstance(error, DataError)}
    if bad and on_bad_image == "error":
        raise DataError(f"{next(iter(bad.values()))}; {SKIP_HINT}")
    skipped += bad
    return {name: image for name, image in items if name not in bad}


def none_readable(skipped: list[str]) -> DataError:
    """The error that says that all images were skipped."""
    first = f"; the first is {skipped[0]}" if skipped else ""
    return DataError(f"none of the {len(skipped)} images could be read{first}")


def num_known(source: ImageSource) -> int | None:
    """The number of images; None for a stream."""
    return len(source) if hasattr(source, "__len__") else None


def progress_bar(what: str, total: int | None) -> tqdm:
    with kept_state():
        return tqdm(total=total, desc=what, unit="image", disable=not PartialState().is_main_process)


def cache_folder(manifest: dict, cache_dir: str | Path | None) -> Path:
    """The folder of a cache: the one given, or one named after a hash of the manifest."""
    key = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]
    return Path(cache_dir) if cache_dir is not None else default_cache_dir() / key


def check_manifest(folder: Path, manifest: dict) -> bool:
    """Whether the folder holds a cache, begun or complete. Raises DataError if it is a cache of something else."""
    path = folder / "manifest.json"
    if not is_utf8(folder) or (folder.exists() and not folder.is_dir()):
        what = "a file" if is_utf8(folder) else "not UTF-8"
        raise DataError(f"{printable(str(folder))} is {what}; pass another --data.cache_dir")
    if not path.exists():
        if folder.exists() and not is_empty(folder):
            raise DataError(f"{folder} is not empty and holds no latent cache; pass another --data.cache_dir")
        return False
    changed = changed_keys(path, manifest)
    if changed:
        raise DataError(
            f"the latent cache in {folder} was made with another {', '.join(changed)}; "
            "delete it or pass another --data.cache_dir"
        )
    return True


def shard_path(folder: Path, start: int) -> Path:
    return folder / f"moments-{start:08d}.safetensors"


def count_path(folder: Path) -> Path:
    """The file with the number of images, which is there when all shards have been written once."""
    return folder / "num_pictures.json"


def counted_images(folder: Path) -> int | None:
    """The number of images in a cache; None if it has not been complete yet."""
    try:
        return int(count_path(folder).read_text())
    except (OSError, ValueError):
        return None


def write_cache(
    folder: Path,
    manifest: dict,
    encode: Encode,
    source: ImageSource,
    batch_size: int,
    num_workers: int,
    what: str,
) -> None:
    """Write what is not there yet of a cache: the main process writes, the others wait.

    Args:
        folder: The folder of the cache.
        manifest: Everything it depends on, with `shard_size`, the number of images in one file.
        encode: Makes a shard.
        source: The data set.
        batch_size: Images in a batch that `encode` is given.
        num_workers: Processes that decode images.
        what: What the progress bar says.

    Raises:
        DataError: If the folder holds another cache, or as `encode`.
        OSError: If it cannot be written.
    """
    with kept_state(), PartialState().main_process_first():
        if not check_manifest(folder, manifest):
            begin_cache(folder, manifest)
        build_shards(folder, encode, source, batch_size, num_workers, manifest["shard_size"], what)


def begin_cache(folder: Path, manifest: dict) -> None:
    """Write the manifest of a cache into its folder, which is made. Raises OSError if it cannot be written."""
    try:
        check_folder(folder)
        write_json(folder / "manifest.json", manifest)
    except OSError as error:
        raise OSError(f"{one_line(error)}; pass another --data.cache_dir") from error


def build_shards(
    folder: Path,
    encode: Encode,
    source: ImageSource,
    batch_size: int,
    num_workers: int,
    shard_size: int,
    what: str,
) -> None:
    """Write every shard that is not there yet; otherwise as `write_cache`."""
    counted = counted_images(folder)
    total = num_known(source) if counted is None else counted
    starts = itertools.count(0, shard_size) if total is None else range(0, total, shard_size)
    missing = (start for start in starts if not shard_path(folder, start).exists())
    first = next(missing, None)
    if first is not None:
        with progress_bar(what, total) as progress:
            for start in itertools.chain([first], missing):
                progress.update(start - progress.n)
                batches = source.batches(start, shard_size, batch_size, num_workers)
                tensors, metadata, count = encode(batches=batches, progress=progress)
                if count:
                    write_aside(shard_path(folder, start), partial(save_file, tensors, metadata=metadata))
                if count < shard_size:  # the end, which a stream shows in no other way
                    total = start + count
                    break
    if counted is None:
        write_aside(count_path(folder), lambda aside: aside.write_text(f"{total}\n"))


@contextmanager
def stored_shard(path: Path, again: str) -> Iterator[tuple[dict[str, Tensor], dict]]:
    """Context with the memory-mapped tensors and the metadata of a shard.

    Raises DataError if they cannot be read or used, which says what happens `again` once the file is deleted.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = {name: json.loads(value) for name, value in file.metadata().items()}
        yield tensors, metadata
    except Exception as error:  # safetensors raises its own type for a truncated file
        raise DataError(f"{path} is damaged; delete it to have {again} again") from error
