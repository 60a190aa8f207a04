"""Data sets of pictures, and the cache of their latents.

`load_pictures` turns a name into square RGB pictures; `cache_latents` encodes them once with a frozen autoencoder.
Latents of a mirrored picture are not mirrored latents, so the cache holds each orientation as its own encoding.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import torch
from accelerate import PartialState
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from latent_dmmd.latents import Autoencoder, autoencoder_hash, encode_moments, standardise, to_pixels

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
OnBadImage = Literal["error", "skip"]
CACHE_FORMAT = 1
SKIP_HINT = "pass --data.on_bad_image skip to leave out pictures that cannot be read"


class DataError(ValueError):
    """Something about the data that the user can mend; the message is one line."""


def one_line(error: Exception) -> str:
    """What a library says about an error, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def read_picture(source: str | Path | bytes, resolution: int, name: str | None = None) -> Tensor:
    """Decode one picture: turned as its EXIF says, transparency on white, shorter side resized, centre cropped.

    Args:
        source: A file, or its bytes.
        resolution: Side of the result in pixels.
        name: What to call it in messages; the file by default.

    Returns:
        RGB as uint8, with shape (3, resolution, resolution).

    Raises:
        DataError: If it is no picture, damaged, a decompression bomb, or an eighth of the resolution or smaller.
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
        raise DataError(f"cannot read {name}: not a picture") from error
    except Exception as error:  # a decoder raises whatever a damaged file trips it over
        raise DataError(f"cannot read {name}: {one_line(error)}") from error
    if min(image.size) <= resolution // 8:
        raise DataError(f"{name} is {image.width}x{image.height} pixels, too small for resolution {resolution}")
    image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of a picture in any mode: the first frame, 16-bit grey scaled, transparency composited on white.

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


class PictureDataset(Dataset):
    """Pictures as uint8 tensors of shape (3, R, R), read when asked for.

    Args:
        names: What to call each picture.
        read: From an index to a file or to bytes.
        resolution: R.
        fingerprint: Changes whenever the data do.
    """

    def __init__(
        self, names: list[str], read: Callable[[int], str | Path | bytes], resolution: int, fingerprint: str
    ) -> None:
        self.names, self.read, self.resolution, self.fingerprint = names, read, resolution, fingerprint

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self.names):
            raise IndexError(index)
        return read_picture(self.read(index), self.resolution, self.names[index])


def load_pictures(name_or_path: str, resolution: int = 256, image_column: str = "image") -> PictureDataset:
    """A data set of pictures by name.

    Args:
        name_or_path: `elpv` or a part of it such as `elpv:train`, see `elpv_files`; a folder of pictures, searched
            through; a parquet or arrow file; or `name` or `name:split` of a data set on the hub, split `train` by
            default.
        resolution: Side of the pictures in pixels.
        image_column: The column that holds pictures, for tables and hub data.

    Raises:
        DataError: If there is no such data, or it holds no pictures.
    """
    name, _, split = name_or_path.partition(":")
    if name == "elpv":
        return pictures_in_files(elpv_files(split or "all"), resolution)
    path = Path(name_or_path)
    if path.is_dir():
        paths = sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES and not p.is_dir())
        if not paths:
            raise DataError(f"no pictures in {path}: looked for {', '.join(sorted(PICTURE_SUFFIXES))}")
        return pictures_in_files(paths, resolution)
    if path.suffix in (".parquet", ".arrow"):
        if not path.exists():
            raise DataError(f"no file {path}")
        table = load_table(name_or_path, path.suffix[1:], data_files=str(path), split="train")
    elif path.is_absolute() or name_or_path.startswith(".") or path.exists():
        raise DataError(f"no folder {path}; give a folder of pictures, a parquet file, elpv:train, or a hub name")
    else:
        table = load_table(name_or_path, name, split=split or "train")
    if not len(table):
        raise DataError(f"no pictures in {name_or_path}")
    if image_column not in table.column_names:
        raise DataError(f"{name_or_path} has no column {image_column!r}; it has {', '.join(table.column_names)}")
    try:
        table = table.select_columns(image_column).cast_column(image_column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise DataError(f"column {image_column!r} of {name_or_path} holds no pictures: {one_line(error)}") from error

    def read(index: int) -> str | bytes:
        cell = table[index][image_column]
        if cell is None:
            return b""
        return cell["bytes"] if cell["bytes"] is not None else cell["path"]

    names = [f"{name_or_path}[{i}]" for i in range(len(table))]
    return PictureDataset(names, read, resolution, table._fingerprint)


def load_table(name_or_path: str, *args: str, **options: str) -> datasets.Dataset:
    """`datasets.load_dataset` of a file or a hub name. Raises DataError if it cannot be had."""
    try:
        return datasets.load_dataset(*args, **options)
    except Exception as error:  # datasets raises a dozen types
        raise DataError(f"{name_or_path} is no folder, and no data set: {one_line(error)}") from error


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


def pictures_in_files(paths: list[Path], resolution: int) -> PictureDataset:
    """Pictures in files; the fingerprint covers their names, sizes and times."""
    digest = hashlib.sha256()
    for path in paths:
        # a dangling link is named when it is read
        status = path.stat() if path.exists() else path.lstat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return PictureDataset([str(p) for p in paths], lambda i: paths[i], resolution, digest.hexdigest()[:16])


@dataclass(frozen=True)
class LatentCache:
    """Posterior moments of a data set, and what standardises them.

    Attributes:
        mean: Means, with shape (N, O, C, h, w) for O orientations.
        std: Standard deviations, shaped like `mean`; None if the encoder is deterministic.
        channel_mean: Mean of raw latents per channel, with shape (C).
        channel_std: Their standard deviation per channel, with shape (C).
        skipped: Names of pictures that could not be read.
    """

    mean: Tensor
    std: Tensor | None
    channel_mean: Tensor
    channel_std: Tensor
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.mean)

    def draw(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Standardised latents of random pictures in random orientations, with shape (batch_size, C, h, w)."""
        index = torch.randint(len(self.mean), (batch_size,), generator=generator)
        orientation = torch.randint(self.mean.shape[1], (batch_size,), generator=generator)
        latents = self.mean[index, orientation]
        if self.std is not None:
            latents = latents + self.std[index, orientation] * torch.randn(latents.shape, generator=generator)
        return standardise(latents, self.channel_mean, self.channel_std)


def keyed_generator(*key: int) -> torch.Generator:
    """A CPU generator seeded by all of its key."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


@dataclass(frozen=True)
class PixelCache:
    """Pictures of a data set as particles, and what standardises them.

    Attributes:
        images_uint8: The pictures, with shape (N, 3, H, W).
        horizontal_flip: Whether mirrored pictures are drawn, too.
        channel_mean: Mean of pixels in [-1, 1] per channel, with shape (3).
        channel_std: Their standard deviation per channel, with shape (3).
        skipped: Names of pictures that could not be read.
    """

    images_uint8: Tensor
    horizontal_flip: bool
    channel_mean: Tensor
    channel_std: Tensor
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images_uint8)

    def draw(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Standardised random pictures, with shape (batch_size, 3, H, W)."""
        index = torch.randint(len(self), (batch_size,), generator=generator)
        flip = torch.rand(batch_size, generator=generator) < 0.5
        images = self.images_uint8[index]
        if self.horizontal_flip:
            images[flip] = images[flip].flip(-1)
        return standardise(to_pixels(images), self.channel_mean, self.channel_std)


def cache_pixels(
    pictures: PictureDataset, horizontal_flip: bool = False, on_bad_image: OnBadImage = "error"
) -> PixelCache:
    """Read a data set into memory, one byte a number.

    Args:
        pictures: The data set.
        horizontal_flip: Whether mirrored pictures are data, too.
        on_bad_image: "error" stops at a picture that cannot be read and names it; "skip" leaves it out.

    Raises:
        DataError: If a picture cannot be read, or none could be.
    """
    images, skipped, total, square = [], [], 0.0, 0.0
    progress = tqdm(range(len(pictures)), desc="reading", unit="picture", disable=not PartialState().is_main_process)
    for i in progress:
        name, image = PicturesOrErrors(pictures, range(i, i + 1))[0]
        if isinstance(image, DataError):
            if on_bad_image == "error":
                raise DataError(f"{image}; {SKIP_HINT}")
            skipped.append(name)
            continue
        images.append(image)
        pixels = to_pixels(image).double()
        total, square = total + pixels.mean((1, 2)), square + pixels.square().mean((1, 2))
    if not images:
        raise DataError(f"none of the {len(pictures)} pictures could be read; the first is {skipped[0]}")
    mean = total / len(images)
    std = (square / len(images) - mean.square()).clamp(min=1e-12).sqrt()
    return PixelCache(torch.stack(images), horizontal_flip, mean.float(), std.float(), tuple(skipped))


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/latent_dmmd`, or `~/.cache/latent_dmmd`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latent_dmmd"


def cache_latents(
    vae: Autoencoder,
    pictures: PictureDataset,
    cache_dir: str | Path | None = None,
    horizontal_flip: bool = True,
    on_bad_image: OnBadImage = "error",
    batch_size: int = 16,
    num_workers: int = 0,
    shard_size: int = 512,
) -> LatentCache:
    """Encode a data set once, or read what was encoded before.

    A manifest names everything the latents depend on. Shards are written aside and renamed, so an interrupted run goes
    on where it was; with several processes one writes and all read.

    Args:
        vae: The frozen autoencoder.
        pictures: The data set.
        cache_dir: The folder of this cache; by default one named after a hash of the manifest.
        horizontal_flip: Whether mirrored pictures are encoded too.
        on_bad_image: "error" stops at a picture that cannot be read and names it; "skip" leaves it out.
        batch_size: Pictures encoded at once.
        num_workers: Processes that decode pictures.
        shard_size: Pictures in one file.

    Raises:
        DataError: If `cache_dir` holds another cache, or a picture cannot be read, now or when the cache was made, or
            no picture could be.
        FloatingPointError: If the autoencoder returns a value that is not finite; the message names the picture.
    """
    manifest = {
        "format": CACHE_FORMAT,
        "autoencoder": autoencoder_hash(vae),
        "data": pictures.fingerprint,
        "num_pictures": len(pictures),
        "resolution": pictures.resolution,
        "horizontal_flip": horizontal_flip,
        "shard_size": shard_size,
    }
    key = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir() / key
    with PartialState().main_process_first():
        check_manifest(folder, manifest)
        build_shards(folder, vae, pictures, horizontal_flip, on_bad_image, batch_size, num_workers, shard_size)
    cache = read_shards(folder, len(pictures), shard_size)
    if cache.skipped and on_bad_image == "error":
        raise DataError(f"the latent cache in {folder} leaves out {cache.skipped[0]}; {SKIP_HINT}")
    return cache


def check_manifest(folder: Path, manifest: dict) -> None:
    """Raise DataError if the folder holds a cache of something else; write the manifest if it holds none."""
    path = folder / "manifest.json"
    if not path.exists():
        if folder.exists() and any(folder.iterdir()):
            raise DataError(f"{folder} is not empty and holds no latent cache; pass another --data.cache_dir")
        folder.mkdir(parents=True, exist_ok=True)
        write_aside(path, lambda aside: aside.write_text(json.dumps(manifest, indent=2)))
        return
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = {}
    changed = [name for name in manifest if found.get(name) != manifest[name]]
    if changed:
        raise DataError(
            f"the latent cache in {folder} was made with another {', '.join(changed)}; "
            "delete it or pass another --data.cache_dir"
        )


def shard_path(folder: Path, start: int) -> Path:
    return folder / f"moments-{start:08d}.safetensors"


def build_shards(
    folder: Path,
    vae: Autoencoder,
    pictures: PictureDataset,
    horizontal_flip: bool,
    on_bad_image: OnBadImage,
    batch_size: int,
    num_workers: int,
    shard_size: int,
) -> None:
    """Encode every shard that is not there yet."""
    starts = [s for s in range(0, len(pictures), shard_size) if not shard_path(folder, s).exists()]
    if not starts:
        return
    device = next(vae.parameters()).device
    total = sum(min(shard_size, len(pictures) - s) for s in starts)
    progress = tqdm(total=total, desc="encoding", unit="picture", disable=not PartialState().is_main_process)
    for start in starts:
        indices = range(start, min(start + shard_size, len(pictures)))
        loader = DataLoader(
            PicturesOrErrors(pictures, indices),
            batch_size,
            num_workers=num_workers,
            collate_fn=list,
        )
        shard = {"mean": [], "std": []}
        skipped = []
        for items in loader:
            bad = [(name, error) for name, error in items if isinstance(error, DataError)]
            if bad and on_bad_image == "error":
                raise DataError(f"{bad[0][1]}; {SKIP_HINT}")
            skipped += [name for name, _ in bad]
            good = [(name, image) for name, image in items if isinstance(image, Tensor)]
            progress.update(len(items))
            if not good:
                continue
            pixels = to_pixels(torch.stack([image for _, image in good])).to(device)
            views = [pixels, pixels.flip(-1)] if horizontal_flip else [pixels]
            moments = [encode_moments(vae, view) for view in views]
            for name, values in zip(("mean", "std"), zip(*moments)):
                stacked = torch.stack(values, dim=1).cpu()
                finite = stacked.isfinite().flatten(1).all(1)
                if not finite.all():
                    culprit = good[int(finite.int().argmin())][0]
                    raise FloatingPointError(
                        f"the autoencoder returns values that are not finite for {culprit}; use it in float32"
                    )
                shard[name].append(stacked)
        tensors = {name: torch.cat(parts) for name, parts in shard.items() if parts}
        write_aside(shard_path(folder, start), partial(save_file, tensors, metadata={"skipped": json.dumps(skipped)}))
    progress.close()


class PicturesOrErrors(Dataset):
    """(name, picture) at the given indices, or (name, error) where it cannot be read.

    The error is returned because a DataLoader puts the traceback of its worker into what it raises.
    """

    def __init__(self, pictures: PictureDataset, indices: range) -> None:
        self.pictures, self.indices = pictures, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[str, Tensor | DataError]:
        index = self.indices[i]
        try:
            return self.pictures.names[index], self.pictures[index]
        except DataError as error:
            return self.pictures.names[index], error


def read_shards(folder: Path, num_pictures: int, shard_size: int) -> LatentCache:
    """All shards of a complete cache."""
    means, stds, skipped = [], [], []
    for start in range(0, num_pictures, shard_size):
        path = shard_path(folder, start)
        try:
            tensors = load_file(path)
        except Exception as error:  # safetensors raises its own type for a truncated file
            raise DataError(f"{path} is damaged; delete it to have it encoded again") from error
        with safe_open(path, "pt") as file:
            skipped += json.loads((file.metadata() or {}).get("skipped", "[]"))
        if tensors:
            means.append(tensors["mean"])
            stds.append(tensors["std"])
    if not means:
        raise DataError(f"none of the {num_pictures} pictures could be read; the first is {skipped[0]}")
    mean, std = torch.cat(means), torch.cat(stds)
    variance = mean.var((0, 1, 3, 4)) + std.square().mean((0, 1, 3, 4))
    return LatentCache(
        mean=mean,
        std=std if std.any() else None,
        channel_mean=mean.mean((0, 1, 3, 4)),
        channel_std=variance.sqrt().clamp(min=1e-6),
        skipped=tuple(skipped),
    )


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name, then rename it: a reader sees all of it or nothing."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
