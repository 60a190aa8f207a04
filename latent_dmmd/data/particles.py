"""What training draws from: latents that were encoded once and stay on the disk, or pixels in memory.

Latents of a mirrored image are not mirrored latents, so the cache holds each orientation as its own encoding.
"""

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from latent_dmmd.data.autoencoder import Autoencoder, check_finite_images, encode_moments, standardise
from latent_dmmd.data.shards import (
    SHARD_SIZE,
    SKIP_HINT,
    cache_folder,
    counted_images,
    none_readable,
    num_known,
    progress_bar,
    readable,
    shard_path,
    stored_shard,
    write_cache,
)
from latent_dmmd.data.sources import ImageSource, OnBadImage
from latent_dmmd.utils.errors import DataError
from latent_dmmd.utils.hashing import module_hash
from latent_dmmd.utils.images import to_pixels

CACHE_FORMAT = 2


class Particles:
    """Base class of what training draws from; `labels` holds the class of every image, or is None."""

    @cached_property
    def members(self) -> list[Tensor]:
        """Indices of the images of every class; empty without classes."""
        return [] if self.labels is None else [torch.where(self.labels == c)[0] for c in self.labels.unique()]

    def num_classes(self) -> int:
        """C; 0 without classes."""
        return len(self.members)

    def random_indices(self, count: int, generator: torch.Generator, label: int | None) -> Tensor:
        """Indices of random images, of one class or of any if None."""
        if label is None:
            return torch.randint(len(self), (count,), generator=generator, device="cpu")
        members = self.members[label]
        return members[torch.randint(len(members), (count,), generator=generator, device="cpu")]

    def draw_with_noise(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Clean particles and standard normal noise, each with shape (count, C, h, w)."""
        x_0 = self.draw(count, generator)
        return x_0, torch.randn(x_0.shape, generator=generator, device="cpu")


@dataclass(frozen=True)
class LatentCache(Particles):
    """Posterior moments of a data set, and what standardises them.

    Shards from a cache on the disk are memory-mapped: a draw reads what it needs, and the system drops it again.

    Attributes:
        shards: Means and standard deviations, each with shape (n, O, C, h, w) for O orientations; the deviations are
            None if the encoder is deterministic.
        channel_mean: Mean of raw latents per channel, with shape (C).
        channel_std: Their standard deviation per channel, with shape (C).
        skipped: Names of images that could not be read.
        labels: Class of every image, with shape (N); None if there are no classes.
    """

    shards: tuple[tuple[Tensor, Tensor | None], ...]
    channel_mean: Tensor
    channel_std: Tensor
    skipped: tuple[str, ...] = ()
    labels: Tensor | None = None

    def __len__(self) -> int:
        return sum(len(mean) for mean, _ in self.shards)

    @cached_property
    def starts(self) -> Tensor:
        """Index of the first image of every shard."""
        lengths = (len(mean) for mean, _ in self.shards[:-1])
        return torch.tensor([0, *itertools.accumulate(lengths)], device="cpu")

    @property
    def mean(self) -> Tensor:
        """All means, with shape (N, O, C, h, w), copied into memory."""
        return torch.cat([mean for mean, _ in self.shards])

    @property
    def std(self) -> Tensor | None:
        """All standard deviations, shaped like `mean`, copied into memory; None if the encoder is deterministic."""
        deviations = [std for _, std in self.shards]
        return None if deviations[0] is None else torch.cat(deviations)

    def draw(self, batch_size: int, generator: torch.Generator, label: int | None = None) -> Tensor:
        """Standardised latents of random images, of one class or of any if None, in random orientations, with shape
        (batch_size, C, h, w)."""
        num_orientations = self.shards[0][0].shape[1]
        index = self.random_indices(batch_size, generator, label)
        orientation = torch.randint(num_orientations, (batch_size,), generator=generator, device="cpu").tolist()
        which = torch.bucketize(index, self.starts, right=True) - 1
        rows = list(zip(which.tolist(), (index - self.starts[which]).tolist(), orientation))
        latents = torch.stack([self.shards[s][0][i, o] for s, i, o in rows])
        if self.shards[0][1] is not None:
            std = torch.stack([self.shards[s][1][i, o] for s, i, o in rows])
            latents = latents + std * torch.randn(latents.shape, generator=generator, device="cpu")
        return standardise(latents, self.channel_mean, self.channel_std)


@dataclass(frozen=True)
class PixelCache(Particles):
    """Images of a data set as particles, and what standardises them.

    Attributes:
        images_uint8: The images, with shape (N, 3, H, W).
        horizontal_flip: Whether mirrored images are drawn as well.
        channel_mean: Mean of pixels in [-1, 1] per channel, with shape (3).
        channel_std: Their standard deviation per channel, with shape (3).
        skipped: Names of images that could not be read.
        labels: Class of every image, with shape (N); None if there are no classes.
    """

    images_uint8: Tensor
    horizontal_flip: bool
    channel_mean: Tensor
    channel_std: Tensor
    skipped: tuple[str, ...] = ()
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images_uint8)

    def draw(self, batch_size: int, generator: torch.Generator, label: int | None = None) -> Tensor:
        """Standardised random images, of one class or of any if None, with shape (batch_size, 3, H, W)."""
        index = self.random_indices(batch_size, generator, label)
        flip = torch.rand(batch_size, generator=generator, device="cpu") < 0.5
        images = self.images_uint8[index]
        if self.horizontal_flip:
            images[flip] = images[flip].flip(-1)
        return standardise(to_pixels(images), self.channel_mean, self.channel_std)


def cache_pixels(source: ImageSource, horizontal_flip: bool, on_bad_image: OnBadImage = "error") -> PixelCache:
    """Read a data set into memory, one byte a number.

    Args:
        source: The data set.
        horizontal_flip: Whether mirrored images are data as well.
        on_bad_image: "error" stops at an image that cannot be read and names it; "skip" leaves it out.

    Raises:
        DataError: If an image cannot be read, or none could be.
    """
    images, skipped, total, square = [], [], 0.0, 0.0
    with progress_bar("reading", num_known(source)) as progress:
        for items in source.batches(0, sys.maxsize, 16):
            for image in readable(items, on_bad_image, skipped).values():
                images.append(image)
                pixels = to_pixels(image).double()
                total, square = total + pixels.mean((1, 2)), square + pixels.square().mean((1, 2))
            progress.update(len(items))
    if not images:
        raise none_readable(skipped)
    mean = total / len(images)
    std = (square / len(images) - mean.square()).clamp(min=1e-12).sqrt()
    return PixelCache(torch.stack(images), horizontal_flip, mean.float(), std.float(), tuple(skipped))


def cache_latents(
    vae: Autoencoder,
    source: ImageSource,
    cache_dir: str | Path | None = None,
    *,
    horizontal_flip: bool,
    batch_size: int,
    on_bad_image: OnBadImage = "error",
    num_workers: int = 0,
    shard_size: int = SHARD_SIZE,
) -> LatentCache:
    """Encode a data set once, or read what was encoded before.

    A manifest names everything the latents depend on. Shards are written aside and renamed, so an interrupted run goes
    on where it was; with several processes one writes and all read. Memory does not grow with the number of images.

    Args:
        vae: The frozen autoencoder.
        source: The data set.
        cache_dir: The folder of this cache; by default one named after a hash of the manifest.
        horizontal_flip: Whether mirrored images are encoded as well.
        on_bad_image: "error" stops at an image that cannot be read and names it; "skip" leaves it out.
        batch_size: Images encoded at once.
        num_workers: Processes that decode images.
        shard_size: Images in one file.

    Raises:
        DataError: If `cache_dir` holds another cache, or an image cannot be read, now or when the cache was made, or
            no image could be.
        FloatingPointError: If the autoencoder returns a value that is not finite; the message names the image.
        OSError: If the cache cannot be written.
    """
    manifest = cache_manifest(vae, source, horizontal_flip, shard_size)
    folder = cache_folder(manifest, cache_dir)
    encode = partial(encode_shard, vae, horizontal_flip=horizontal_flip, on_bad_image=on_bad_image)
    write_cache(folder, manifest, encode, source, batch_size, num_workers, "encoding")
    cache = read_shards(folder, shard_size)
    if cache.skipped and on_bad_image == "error":
        raise DataError(f"the latent cache in {folder} leaves out {cache.skipped[0]}; {SKIP_HINT}")
    return cache


def cache_manifest(vae: Autoencoder, source: ImageSource, horizontal_flip: bool, shard_size: int = SHARD_SIZE) -> dict:
    """Everything the latents of a cache depend on."""
    return {
        "format": CACHE_FORMAT,
        "autoencoder": module_hash(vae),
        "data": source.fingerprint,
        "num_pictures": num_known(source),
        "resolution": source.resolution,
        "horizontal_flip": horizontal_flip,
        "shard_size": shard_size,
    }


def encode_shard(
    vae: Autoencoder,
    batches: Iterator[list[tuple[str, Tensor | DataError]]],
    horizontal_flip: bool,
    on_bad_image: OnBadImage,
    progress: tqdm,
) -> tuple[dict[str, Tensor], dict[str, str], int]:
    """Tensors and metadata of a shard, and the number of images read for it.

    The metadata hold the names of skipped images, and per channel the number, sum and sum of squares of latents.
    """
    device = next(vae.parameters()).device
    parts, skipped, count = {"mean": [], "std": []}, [], 0
    sums = torch.zeros(3, 1, dtype=torch.float64, device="cpu")
    for items in batches:
        good = readable(items, on_bad_image, skipped)
        count += len(items)
        progress.update(len(items))
        if not good:
            continue
        pixels = to_pixels(torch.stack(list(good.values()))).to(device)
        views = [pixels, pixels.flip(-1)] if horizontal_flip else [pixels]
        moments = [encode_moments(vae, view) for view in views]
        mean, std = (torch.stack(values, dim=1).cpu() for values in zip(*moments))
        check_finite_images(list(good), mean, std)
        parts["mean"].append(mean)
        parts["std"].append(std)
        square = mean.double().square() + std.double().square()
        numbers = torch.full((mean.shape[2],), mean[:, :, 0].numel(), dtype=torch.float64, device=mean.device)
        sums = sums + torch.stack([numbers, *(a.double().sum((0, 1, 3, 4)) for a in (mean, square))])
    tensors = {name: torch.cat(tensors) for name, tensors in parts.items() if tensors}
    if tensors and not tensors["std"].any():
        del tensors["std"]
    return tensors, {"skipped": json.dumps(skipped), "sums": json.dumps(sums.tolist())}, count


def read_shards(folder: Path, shard_size: int) -> LatentCache:
    """All shards of a complete cache, memory-mapped."""
    shards, skipped, sums = [], [], 0.0
    for start in range(0, counted_images(folder) or 0, shard_size):
        with stored_shard(shard_path(folder, start), "it encoded") as (tensors, metadata):
            skipped += metadata["skipped"]
            if tensors:
                shards.append((tensors["mean"], tensors.get("std")))
                sums = sums + torch.tensor(metadata["sums"], dtype=torch.float64, device="cpu")
    if not shards:
        raise none_readable(skipped)
    count, total, square = sums
    mean = total / count
    return LatentCache(
        shards=tuple(shards),
        channel_mean=mean.float(),
        channel_std=(square / count - mean.square()).clamp(min=1e-12).sqrt().float(),
        skipped=tuple(skipped),
    )
