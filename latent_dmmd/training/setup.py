"""What a run needs before its first step: autoencoder, images, trainer and particles."""

from dataclasses import replace
from typing import NamedTuple

import torch
from accelerate import Accelerator
from diffusers.utils import is_tensorboard_available, is_wandb_available
from torch import Tensor

from latent_dmmd.data.autoencoder import Autoencoder, encode_moments, load_autoencoder
from latent_dmmd.data.particles import LatentCache, PixelCache, cache_latents, cache_pixels
from latent_dmmd.data.sources import ImageSource, load_images
from latent_dmmd.training.config import Config, TrainingConfig
from latent_dmmd.training.trainer import Trainer
from latent_dmmd.utils.errors import ConfigError, DataError


class Setup(NamedTuple):
    """What a configuration names: the autoencoder (None for pixels), the images, the shape (C, h, w) of particles, and
    the trainer."""

    vae: Autoencoder | None
    source: ImageSource
    shape: tuple[int, int, int]
    trainer: Trainer


def check_tracker(name: str | None) -> None:
    """Raise ConfigError if a tracker is asked for and not installed; Accelerate would drop it in silence."""
    available = {None: True, "tensorboard": is_tensorboard_available(), "wandb": is_wandb_available()}
    if not available[name]:
        raise ConfigError(f"training.log_with={name} is not installed: pip install {name}")


def set_up(config: Config, accelerator: Accelerator) -> Setup:
    """Load and build what a configuration names; nothing is written.

    Raises:
        ConfigError: If its parts do not fit each other.
        DataError: If there are no such images.
        ValueError: If there is no such autoencoder.
    """
    name, resolution = config.autoencoder.name_or_path, config.data.resolution
    vae = load_autoencoder(name, accelerator.device) if name else None
    data = config.data
    source = load_images(data.name_or_path, resolution, data.image_column, data.streaming, not config.dry_run)
    shape = tuple(probe_latents(vae, resolution).shape[1:]) if vae else (3, resolution, resolution)
    class_names = source.labels()[0] if data.class_conditional else ()
    trainer = Trainer(config, shape, accelerator, tuple(class_names))
    trainer.method.check_autoencoder(vae)
    return Setup(vae, source, shape, trainer)


def may_differ(options: TrainingConfig) -> tuple[str, ...]:
    """Keys with other values under which a run can go on: what was trained so far does not depend on them."""
    return ("training.num_steps",) if options.learning_rate_schedule == "constant" else ()


def load_particles(vae: Autoencoder | None, source: ImageSource, config: Config) -> LatentCache | PixelCache:
    """The data as particles: encoded images, or pixels without an autoencoder; with their classes if asked for.

    Raises DataError if there are no classes, or all images of one could not be read.
    """
    options = config.data
    if vae is None:
        cache = cache_pixels(source, options.horizontal_flip, options.on_bad_image)
    else:
        cache = cache_latents(
            vae,
            source,
            options.cache_dir,
            horizontal_flip=options.horizontal_flip,
            on_bad_image=options.on_bad_image,
            batch_size=config.autoencoder.batch_size,
            num_workers=options.num_workers,
        )
    if not options.class_conditional:
        return cache
    names, labels = source.labels(cache.skipped)
    missing = set(source.labels()[0]) - set(names)
    if missing:
        raise DataError(f"no image of class {', '.join(sorted(missing))} could be read")
    return replace(cache, labels=labels)


@torch.no_grad()
def probe_latents(vae: Autoencoder, resolution: int) -> Tensor:
    """Latents of a grey image, for their shape. Raises ConfigError if the resolution does not fit the autoencoder."""
    pixels = torch.zeros(1, 3, resolution, resolution, device=next(vae.parameters()).device)
    try:
        return encode_moments(vae, pixels)[0]
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"data.resolution={resolution} does not fit the autoencoder: {error}") from error
