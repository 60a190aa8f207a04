"""How well an autoencoder gives back the images of a set: PSNR, and the Fréchet distance of its reconstructions."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from latent_dmmd import __version__
from latent_dmmd.data.autoencoder import Autoencoder, autoencoder_folder, decode_pixels, encode_moments
from latent_dmmd.data.sources import counted
from latent_dmmd.metrics.evaluation import SMALL_BELOW
from latent_dmmd.metrics.extractors import EXTRACTORS, MIN_IMAGES, Extractor, ImageSet, load_extractor
from latent_dmmd.metrics.scores import frechet_distance
from latent_dmmd.utils.errors import DataError
from latent_dmmd.utils.files import write_json
from latent_dmmd.utils.images import to_pixels, to_uint8

BATCH_SIZE = 8
INCEPTION = "inception-v3"


@dataclass(frozen=True)
class AutoencoderScores:
    """How well an autoencoder gives back a set of images.

    Args:
        autoencoder: Its name.
        autoencoder_class: Its class in diffusers.
        data: Name of the images.
        n: Their number.
        image_size: Height and width in pixels.
        psnr: 10 log10(255² / e) of 8-bit images in dB, where e is the mean squared error over all of them.
        distances: Fréchet distance of the reconstructions and the images, n each, by the name of the features; empty
            below 4 images.
        latent_shape: Shape (C, h, w) of the latents of one image.
        numbers_per_image: C · h · w.
        num_parameters: Of encoder and decoder.
        file_bytes: Size of the weights' files; None if they are on the hub.
        skipped: Names of images that cannot be read and were left out.
        seconds: Time taken.
        library_version: Of this library.
    """

    autoencoder: str
    autoencoder_class: str
    data: str | None
    n: int
    image_size: tuple[int, int]
    psnr: float
    distances: dict[str, float]
    latent_shape: tuple[int, int, int]
    numbers_per_image: int
    num_parameters: int
    file_bytes: int | None
    skipped: tuple[str, ...]
    seconds: float
    library_version: str = __version__

    def as_dict(self) -> dict:
        """The fields, where each distance has a name of its own, such as `fd_effnetlite0_reconstruction`."""
        values = {name: value for name, value in vars(self).items() if name != "distances"}
        return values | {f"{name}_reconstruction": value for name, value in self.distances.items()}

    def save(self, path: str | Path) -> None:
        """Write `as_dict()` as JSON, complete or not at all; its folder is made. Raises OSError if it cannot be."""
        write_json(Path(path), self.as_dict())

    def rows(self) -> list[tuple[str, str]]:
        """What is measured, and the figure with its unit and n."""
        n = f"n = {self.n}"
        distances = [(f"{name}, reconstructions / real", f"{d:.4g}, {n}") for name, d in self.distances.items()]
        size = [] if self.file_bytes is None else [("weights on the disk", f"{self.file_bytes / 1e6:.1f} MB")]
        return [
            ("PSNR", f"{self.psnr:.2f} dB, {n}"),
            *distances,
            ("latents", f"{' × '.join(map(str, self.latent_shape))}, {self.numbers_per_image:,} numbers per image"),
            ("parameters", f"{self.num_parameters:,}"),
            *size,
        ]

    def __str__(self) -> str:
        size = "{1} × {0}".format(*self.image_size)
        images = f"{counted(self.n, 'image')} of {self.data}"
        lines = [f"{self.autoencoder_class} on {images}, {size} pixels, {self.seconds:.0f} s"]
        lines += [f"  {what:<44}{figure}" for what, figure in self.rows()]
        if self.n < MIN_IMAGES:
            lines.append(f"  Fewer than {MIN_IMAGES} images have no Fréchet distance.")
        elif self.distances and self.n < SMALL_BELOW:
            lines.append(f"  Fréchet distances below n = {SMALL_BELOW} are biased upwards: compare at equal n only.")
        return "\n".join(lines)


@torch.no_grad()
def finite_reconstructions(vae: Autoencoder, images_uint8: Tensor) -> tuple[Tensor, Tensor]:
    """Latents of images, and decode(encode(·)) as uint8 with shape (B, 3, H, W), on the CPU.

    Raises FloatingPointError if latents or pixels are not finite, and ValueError if images come back in another size.
    """
    latents, _ = encode_moments(vae, to_pixels(images_uint8).to(next(vae.parameters()).device))
    pixels = decode_pixels(vae, latents)
    for what, values in (("latents", latents), ("reconstructions", pixels)):
        if not values.isfinite().all():
            raise FloatingPointError(f"the autoencoder's {what} are not finite; use another, or train it in float32")
    if pixels.shape != images_uint8.shape:
        raise ValueError("the autoencoder does not give back {} × {} pixels".format(*images_uint8.shape[2:]))
    return latents, to_uint8(pixels).cpu()


def squared_errors(images_uint8: Tensor, reconstructions: Tensor) -> Tensor:
    """Mean squared error of each image (B, 3, H, W), in grey levels, with shape (B)."""
    return (reconstructions.float() - images_uint8.float()).square().mean((1, 2, 3))


def psnr_of_error(mean_square: float) -> float:
    """PSNR in dB of a mean squared error of 8-bit values; an error of 0 counts as 1e-9, so that it stays finite."""
    return float(10 * torch.log10(torch.tensor(255.0**2 / max(mean_square, 1e-9), device="cpu")))


def psnr_of(vae: Autoencoder, images_uint8: Tensor) -> float:
    """PSNR in dB of the reconstructions of images (N, 3, H, W), N ≥ 1, of the mean squared error over all of them."""
    batches = images_uint8.split(BATCH_SIZE)
    errors = [squared_errors(batch, finite_reconstructions(vae, batch)[1]) for batch in batches]
    return psnr_of_error(torch.cat(errors).mean().item())


def check_varied(images: Dataset[Tensor] | Tensor, name: str | None) -> None:
    """Raise DataError if every image is of one colour; the first that is not ends the search."""
    if all((images[i] == images[i][:, :1, :1]).all() for i in range(len(images))):
        raise DataError(
            f"all {len(images)} images of {name} are of one colour each, and no autoencoder can be judged on them; "
            "give other images"
        )


def evaluate_autoencoder(
    vae: Autoencoder,
    images: ImageSet,
    *,
    autoencoder: str,
    data: str | None = None,
    extractors: Sequence[Extractor] = ("efficientnet-lite0",),
    inception_weights: str | None = None,
    skipped: tuple[str, ...] = (),
    folder: str | Path | None = None,
) -> AutoencoderScores:
    """Measure how well an autoencoder gives back images; each is encoded and decoded once.

    Args:
        vae: The autoencoder, frozen.
        images: uint8 RGB of one size, with shape (3, H, W) each.
        autoencoder: What to call it, a folder or a name on the hub.
        data: What to call the images.
        extractors: Networks whose features are compared.
        inception_weights: As of `load_extractor`, for "inception-v3".
        skipped: Names of images that were left out.
        folder: Where its weights lie, if not in the folder `autoencoder`.

    Raises:
        DataError: If every image is of one colour.
        FloatingPointError: If latents or reconstructions are not finite.
        ValueError, ImportError, OSError: As `load_extractor`; ValueError if images are not of whole latents, or
            reconstructions of another size.
    """
    start = time.perf_counter()
    check_varied(images, data)
    if inception_weights is not None and INCEPTION not in extractors:
        raise ValueError(f"--inception_weights needs --extractors [{INCEPTION}]")
    weights = {INCEPTION: inception_weights}
    nets = [load_extractor(name, weights.get(name)) for name in extractors if len(images) >= MIN_IMAGES]
    errors, features = [], [([], []) for _ in nets]
    hidden = not sys.stderr.isatty()
    for first in tqdm(range(0, len(images), BATCH_SIZE), desc="reconstructing", unit="batch", disable=hidden):
        batch = torch.stack([images[i] for i in range(first, min(first + BATCH_SIZE, len(images)))])
        latents, reconstructions = finite_reconstructions(vae, batch)
        errors.append(squared_errors(batch, reconstructions))
        for net, sets in zip(nets, features):
            for kept, seen in zip(sets, (reconstructions, batch)):
                kept.append(features_of(net, seen))
    distances = [frechet_distance(*map(torch.cat, sets)) for sets in features]
    return AutoencoderScores(
        autoencoder=autoencoder,
        autoencoder_class=type(getattr(vae, "_orig_mod", vae)).__name__,
        data=data,
        n=len(images),
        image_size=tuple(batch.shape[2:]),
        psnr=psnr_of_error(torch.cat(errors).double().mean().item()),
        distances={EXTRACTORS[name].distance_name: distance for name, distance in zip(extractors, distances)},
        latent_shape=tuple(latents.shape[1:]),
        numbers_per_image=latents[0].numel(),
        num_parameters=sum(p.numel() for p in vae.parameters()),
        file_bytes=weights_bytes(autoencoder_folder(autoencoder) if folder is None else Path(folder)),
        skipped=tuple(skipped),
        seconds=round(time.perf_counter() - start, 1),
    )


@torch.no_grad()
def features_of(net: torch.nn.Module, images_uint8: Tensor) -> Tensor:
    """Features (B, d) of the Fréchet distance, on the CPU."""
    return net(images_uint8.to(next(net.parameters()).device))[0].float().cpu()


def weights_bytes(folder: Path) -> int | None:
    """Size of the weights' files in a folder; None if there are none."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) or None
