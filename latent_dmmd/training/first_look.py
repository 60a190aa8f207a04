"""What is said of the images before they are encoded: are there enough, and does the autoencoder know them?

What an autoencoder cannot reconstruct no training can generate. A few images are read and encoded in this process and
nothing is drawn, so a run goes on as it would without.
"""

import sys
from collections.abc import Iterator
from itertools import chain, islice
from shlex import join
from typing import NamedTuple

import torch
from torch import Tensor

from latent_dmmd.data.autoencoder import (
    Autoencoder,
    bundled_for,
    check_finite_images,
    decode_pixels,
    encode_moments,
    psnr,
)
from latent_dmmd.data.folders import printable
from latent_dmmd.data.shards import num_known, readable
from latent_dmmd.data.sources import ImagesOrErrors, ImageSource, ImageStream, OnBadImage, counted
from latent_dmmd.methods.base import METHODS
from latent_dmmd.training.autoencoder.config import FROM_SCRATCH, AutoencoderTrainingConfig
from latent_dmmd.training.config import Config, DataConfig
from latent_dmmd.utils.errors import DataError
from latent_dmmd.utils.images import to_pixels

NUM_IMAGES = 16
LOW_PSNR = 24.0  # dB
DOWNSAMPLING = FROM_SCRATCH["downsampling"]  # or half of it
SHARED_KEYS = ("name_or_path", "resolution", "image_column", "on_bad_image")  # with `train-autoencoder`


class AutoencoderFit(NamedTuple):
    """The mean of the PSNR of some images, in dB, and how many these are."""

    psnr: float
    num_images: int

    def __str__(self) -> str:
        return f"PSNR {self.psnr:.1f} dB, mean over {counted(self.num_images, 'image')}"


def first_look(vae: Autoencoder | None, source: ImageSource, config: Config) -> tuple[list[str], AutoencoderFit | None]:
    """Lines to print about the images and the autoencoder, and how well it fits them, if there is one.

    A method that makes its own particles is not trained on images: there is nothing to say.

    Raises:
        DataError: If an image that is looked at cannot be read and is not to be skipped, or all are of one colour.
        FloatingPointError: If latents or reconstruction of one are not finite; the message names it.
    """
    if METHODS[config.objective.name].makes_particles():
        return [], None
    lines, count, batch_size = [], num_known(source), config.training.pairs_per_level
    if count is not None and count < batch_size:
        what = counted(count, "image")
        lines.append(f"note: {what} for training.pairs_per_level={batch_size}: every batch holds some of them twice")
    images = spread_images(source, config.data.on_bad_image)
    if not images:  # whether others can be read is found out when they are encoded
        return [*lines, "note: none of the images that were looked at first can be read"], None
    check_colours(images, source)
    if vae is None:
        return lines, None
    fit = autoencoder_fit(vae, images)
    lines.append(f"autoencoder: {fit}")
    if fit.psnr < LOW_PSNR:
        lines.append(
            f"note: below {LOW_PSNR:.0f} dB these images are outside what the autoencoder knows; {advice(config)}"
        )
    return lines, fit


def advice(config: Config) -> str:
    """What to do about an autoencoder that does not know the images: take a bundled one that does, or train one."""
    bundled = bundled_for(config.data.name_or_path)
    if bundled not in (None, config.autoencoder.name_or_path):
        return f"one that knows them: --autoencoder.name_or_path {bundled}"
    return f"to train one on them: {training_command(config.data)}"


def read_each(source: ImageSource, indices: list[int] | None = None) -> Iterator[tuple[str, Tensor | DataError]]:
    """(name, image) or (name, error) of the images at indices, or of all; without the DataLoader, which draws."""
    if isinstance(source, ImageStream):
        return chain.from_iterable(source.batches(0, sys.maxsize, NUM_IMAGES))
    items = ImagesOrErrors(source, range(len(source)))
    return (items[i] for i in indices or range(len(items)))


def spread_images(source: ImageSource, on_bad_image: OnBadImage) -> dict[str, Tensor]:
    """16 images by name, as uint8 of shape (3, R, R), evenly spread over the data; the first 16 of a stream.

    They are fewer if the data are, or if some of them cannot be read and are to be skipped. Otherwise that raises
    DataError.
    """
    count = num_known(source)
    chosen = min(NUM_IMAGES, NUM_IMAGES if count is None else count)
    indices = None if count is None else [i * count // chosen for i in range(chosen)]
    return readable(list(islice(read_each(source, indices), chosen)), on_bad_image, [])


def check_colours(images: dict[str, Tensor], source: ImageSource) -> None:
    """Raise DataError if these images and all others are of one and the same colour."""
    color = next(iter(images.values()))[:, :1, :1]

    def differs(image: Tensor | DataError) -> bool:
        return isinstance(image, Tensor) and bool((image != color).any())

    if any(map(differs, images.values())) or any(differs(image) for _, image in read_each(source)):
        return
    raise DataError(
        f"all images of {printable(source.name)} are of one colour, RGB {color.flatten().tolist()}; "
        "there is nothing to learn: give images that differ"
    )


@torch.no_grad()
def autoencoder_fit(vae: Autoencoder, images: dict[str, Tensor]) -> AutoencoderFit:
    """The PSNR of an autoencoder's reconstructions, decoded from the posterior mean.

    Args:
        vae: The frozen autoencoder.
        images: At least one, by name, as uint8 of shape (3, R, R).

    Raises:
        FloatingPointError: If latents or reconstruction are not finite; the message names the image.
    """
    device, values = next(vae.parameters()).device, []
    for name, image in images.items():  # one by one: decoding needs more memory than encoding does
        pixels = to_pixels(image[None]).to(device)
        moments = encode_moments(vae, pixels)
        reconstruction = decode_pixels(vae, moments[0])
        check_finite_images([name], *moments, reconstruction)
        values.append(psnr(reconstruction, pixels).item())
    return AutoencoderFit(sum(values) / len(values), len(values))


def shared_words(data: dict[str, object]) -> list[str]:
    """Options that name the same images, for `train` and for `train-autoencoder`, from the keys of a `DataConfig`."""
    defaults = vars(DataConfig())
    given = {key: data.get(key, defaults[key]) for key in SHARED_KEYS}
    shown = {key: value for key, value in given.items() if key == "name_or_path" or value != defaults[key]}
    return [word for key, value in shown.items() for word in (f"--data.{key}", printable(str(value)))]


def training_command(data: DataConfig) -> str:
    """The command that trains an autoencoder on the same images, quoted for the shell."""
    words = ["latent-dmmd", "train-autoencoder", *shared_words(vars(data))]
    if data.resolution % DOWNSAMPLING:
        words += ["--downsampling", str(DOWNSAMPLING // 2)]
    if data.resolution < AutoencoderTrainingConfig.crop_size:
        words += ["--crop_size", str(data.resolution)]
    return join([*words, "--output_dir", "runs/autoencoder"])
