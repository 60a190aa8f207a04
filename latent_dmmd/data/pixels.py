"""Decoded images on the disk, from which crops are cut, and the part of a data set that is kept for validation."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from latent_dmmd.data.shards import (
    SHARD_SIZE,
    SKIP_HINT,
    cache_folder,
    counted_images,
    none_readable,
    readable,
    shard_path,
    stored_shard,
    write_cache,
)
from latent_dmmd.data.sources import ImageDataset, OnBadImage
from latent_dmmd.utils.errors import DataError
from latent_dmmd.utils.images import to_pixels

VALIDATION_SHARE, MAX_VALIDATION = 10, 256


@dataclass(frozen=True)
class CachedImages(Dataset):
    """Images as uint8 (3, R, R). The shards are memory-mapped: a crop reads what it needs, and the system drops it.

    Attributes:
        shards: Images, each uint8 with shape (n, 3, R, R).
        skipped: Names of images that could not be read.
    """

    shards: tuple[Tensor, ...]
    skipped: tuple[str, ...] = ()

    @cached_property
    def ends(self) -> Tensor:
        """Index behind the last image of every shard."""
        return torch.tensor(list(accumulate(map(len, self.shards))), device="cpu")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, i: int) -> Tensor:
        if not 0 <= i < len(self):
            raise IndexError(i)
        shard = int(torch.bucketize(i, self.ends, right=True))
        return self.shards[shard][i - int(self.ends[shard])]


def cache_images(
    source: ImageDataset,
    cache_dir: str | Path | None = None,
    *,
    on_bad_image: OnBadImage = "error",
    num_workers: int = 0,
    shard_size: int = SHARD_SIZE,
) -> CachedImages:
    """Decode a data set once, or read what was decoded before; otherwise as `cache_latents`.

    Raises:
        DataError: If `cache_dir` holds another cache, or an image cannot be read, or none could be.
        OSError: If the cache cannot be written.
    """
    manifest = {
        "format": 1,
        "autoencoder": None,
        "data": source.fingerprint,
        "num_pictures": len(source),
        "resolution": source.resolution,
        "shard_size": shard_size,
    }
    folder = cache_folder(manifest, cache_dir)
    write_cache(folder, manifest, partial(stack_shard, on_bad_image=on_bad_image), source, 16, num_workers, "reading")
    cache = read_images(folder, shard_size)
    if cache.skipped and on_bad_image == "error":
        raise DataError(f"the images in {folder} leave out {cache.skipped[0]}; {SKIP_HINT}")
    return cache


def stack_shard(
    batches: Iterator[list[tuple[str, Tensor | DataError]]], progress: tqdm, on_bad_image: OnBadImage
) -> tuple[dict[str, Tensor], dict[str, str], int]:
    """Tensors and metadata of a shard, and the number of images read for it."""
    images, skipped, count = [], [], 0
    for items in batches:
        images += readable(items, on_bad_image, skipped).values()
        count += len(items)
        progress.update(len(items))
    return {"images_uint8": torch.stack(images)} if images else {}, {"skipped": json.dumps(skipped)}, count


def read_images(folder: Path, shard_size: int) -> CachedImages:
    """All shards of a complete cache, memory-mapped. Raises DataError if there are no images, or a file is damaged."""
    shards, skipped = [], []
    for start in range(0, counted_images(folder) or 0, shard_size):
        with stored_shard(shard_path(folder, start), "its images read") as (tensors, metadata):
            skipped += metadata["skipped"]
            shards += tensors.values()
    if not shards:
        raise none_readable(skipped)
    return CachedImages(tuple(shards), tuple(skipped))


def validation_indices(num_images: int) -> list[int]:
    """Which images of a data set are for validation unless others are named: a fixed random tenth, 1 to 256."""
    count = min(MAX_VALIDATION, max(1, num_images // VALIDATION_SHARE))
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(0), device="cpu")
    return sorted(order[:count].tolist())


def random_crops(
    images: Dataset[Tensor] | Tensor,
    batch_size: int,
    crop_size: int,
    generator: torch.Generator,
    horizontal_flip: bool = True,
    vertical_flip: bool = True,
) -> Tensor:
    """Random crops, flipped at random, as pixels in [-1, 1] with shape (batch_size, 3, crop_size, crop_size).

    Args:
        images: uint8 of one size, with shape (3, H, W) each.
        batch_size: Crops.
        crop_size: Their side.
        generator: Source of randomness.
        horizontal_flip: Whether half of them are mirrored, left to right.
        vertical_flip: Whether half of them are mirrored, top to bottom.
    """
    _, height, width = images[0].shape
    index = torch.randint(len(images), (batch_size,), generator=generator, device="cpu")
    top = torch.randint(height - crop_size + 1, (batch_size,), generator=generator, device="cpu")
    left = torch.randint(width - crop_size + 1, (batch_size,), generator=generator, device="cpu")
    flips = torch.rand(batch_size, 2, generator=generator, device="cpu") < 0.5
    flips = flips & torch.tensor([vertical_flip, horizontal_flip], device="cpu")
    crops = []
    for i, y, x, flip in zip(index.tolist(), top.tolist(), left.tolist(), flips.tolist()):
        crop = images[i][:, y : y + crop_size, x : x + crop_size]
        crops.append(crop.flip([axis + 1 for axis in range(2) if flip[axis]]))
    return to_pixels(torch.stack(crops))
