"""Training of an autoencoder: a configuration in, a run folder out.

The default is a small deep-compression autoencoder (Chen et al., 2025), of the architecture that the project bundles,
on random crops; `loss` has the loss. A saved AutoencoderKL, AutoencoderTiny or AutoencoderDC is fine-tuned
alike: an AutoencoderKL on the mean of its posterior, with the noise of this loss in place of the posterior's own.

The run folder holds `config.yaml`, `metrics.jsonl`, `reconstructions.png`, `checkpoint-{step}/`, `validation.json`, the
names of images that are not trained on, and at the end `autoencoder/`. Running the same command again resumes, exactly:
all randomness is keyed by (seed, step).
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset, Subset
from tqdm.auto import tqdm

from latent_dmmd.data.autoencoder import Autoencoder, downsampling_of, reconstruct
from latent_dmmd.data.folders import printable
from latent_dmmd.data.pixels import cache_images, validation_indices
from latent_dmmd.data.sources import ImageDataset, counted, describe, load_images
from latent_dmmd.metrics.autoencoders import check_varied, finite_reconstructions, psnr_of
from latent_dmmd.metrics.extractors import load_extractor
from latent_dmmd.metrics.sets import load_set
from latent_dmmd.training.autoencoder.card import save_autoencoder
from latent_dmmd.training.autoencoder.config import AutoencoderTrainingConfig
from latent_dmmd.training.autoencoder.trainer import AutoencoderTrainer, build_networks
from latent_dmmd.training.checkpoints import (
    check_run_folder,
    checkpoint_to_resume,
    load_checkpoint,
    nearest_writable,
    pass_over_incomplete,
    prepare_run_folder,
    save_checkpoint,
    writing,
)
from latent_dmmd.training.config import save_config
from latent_dmmd.training.loop import StopRequest
from latent_dmmd.training.metrics_file import MetricsFile
from latent_dmmd.utils.errors import ConfigError, DataError, check
from latent_dmmd.utils.files import write_json
from latent_dmmd.utils.images import labelled_grid, save_image
from latent_dmmd.utils.process import own_accelerator, precision_and_reason

LOG_EVERY, CHECKPOINTS_KEPT = 10, 2
NUM_MEASURED, NUM_SHOWN = 64, 8  # validation images at a checkpoint
MAY_DIFFER = ("checkpointing_steps",)


class Images(NamedTuple):
    """Images to train on and to validate on, each uint8 with shape (3, R, R); names of those that were skipped, and of
    those of the data that are kept for validation."""

    training: Dataset[Tensor]
    validation: Dataset[Tensor]
    skipped: tuple[str, ...]
    held_out: tuple[str, ...] = ()

    def measured(self) -> Tensor:
        """The validation images of a checkpoint, with shape (N, 3, R, R), N at most 64."""
        return torch.stack([self.validation[i] for i in range(min(NUM_MEASURED, len(self.validation)))])


def train_autoencoder(config: AutoencoderTrainingConfig) -> Path:
    """Train an autoencoder and save it as a diffusers folder of float16 safetensors, with its card.

    Args:
        config: What to train on, from where and how.

    Returns:
        The folder of the saved autoencoder, `output_dir/autoencoder`.

    Raises:
        ConfigError: If the configuration cannot be followed; no run folder is made then.
        DataError: If the images cannot be read or used.
        ImportError: If a network's package is missing.
        FloatingPointError: If a loss, or the latents of the start, are not finite; the last checkpoint stays.
        SystemExit: After SIGTERM or Ctrl-C, as of `loop.train`.
    """
    with own_accelerator(config.mixed_precision) as accelerator:
        return train_autoencoder_with(config, accelerator)


def train_autoencoder_with(config: AutoencoderTrainingConfig, accelerator: Accelerator) -> Path:
    """`train_autoencoder` on the device and in the precision of an Accelerator."""
    # initialise and validate
    count = accelerator.num_processes
    check(count == 1, f"an autoencoder is trained by one process, not {count}: start the command without a launcher")
    print("mixed precision: {} ({})".format(*precision_and_reason(config.mixed_precision)))
    nearest_writable(check_run_folder(config, MAY_DIFFER), "output_dir")
    vae, discriminator = build_networks(config)
    config.check_sizes(downsampling_of(vae))
    load_extractor()  # what is missing at the end is missed now
    images = load_training_images(config)
    check_start(vae, images, config)
    trainer = AutoencoderTrainer(config, vae, discriminator, accelerator)

    # load
    folder = prepare_run_folder(config, MAY_DIFFER)
    pass_over_incomplete(accelerator, folder)
    save_config(config, folder / "config.yaml")
    first_step, resume_from = 0, checkpoint_to_resume(folder, "latest", config.num_steps)
    keep_held_out(folder / "validation.json", images.held_out, config, resumed=resume_from is not None)
    if resume_from is not None:
        first_step = load_checkpoint(accelerator, trainer.vae, trainer.ema, resume_from)
        print(f"resuming from {resume_from}, at step {first_step}")

    # train and finish
    with StopRequest(accelerator) as stop:
        run_steps(trainer, images, folder, first_step, stop)
    with writing(folder / "autoencoder", folder):
        parts = (images.validation, len(images.training), images.skipped)
        scores = save_autoencoder(trainer.averaged(), config, folder / "autoencoder", *parts)
    print(f"\n{scores}")
    return folder / "autoencoder"


def load_training_images(config: AutoencoderTrainingConfig) -> Images:
    """Decode the images, or map those that were decoded before, and part them. Raises DataError for too few."""
    options = config.data
    source = load_images(options.name_or_path, options.resolution, options.image_column)
    print(describe(source))
    validation = None
    if config.validation is not None:
        how = (config.validation, options.resolution, None, options.on_bad_image, None, options.image_column)
        validation = load_set(*how)
        refuse_overlap(source, validation.images.dataset, config)
    cache = cache_images(source, options.cache_dir, on_bad_image=options.on_bad_image, num_workers=options.num_workers)
    if cache.skipped:
        print(f"skipped {len(cache.skipped)} unreadable images: {', '.join(cache.skipped[:5])} …")
    training, held_out = cache, ()
    if validation is None:
        indices, left_out = validation_indices(len(cache)), set(cache.skipped)
        names = [Path(name).name for name in source.names if name not in left_out]
        held_out = tuple(names[i] for i in indices)
        validation = Subset(cache, indices)
        training = Subset(cache, sorted(set(range(len(cache))) - set(indices)))
    check_varied(cache, options.name_or_path)
    check_varied(validation, config.validation or f"the tenth of {options.name_or_path} for validation")
    check_enough(len(training), config)
    print(f"training on {counted(len(training), 'image')}, validation on {counted(len(validation), 'other')}")
    return Images(training, validation, cache.skipped, held_out)


def check_enough(num_images: int, config: AutoencoderTrainingConfig) -> None:
    """Raise DataError for fewer images to train on than a batch has."""
    name = printable(config.data.name_or_path)
    if not num_images:
        raise DataError(f"the one image of {name} is for validation; give more images, or others as --validation")
    if num_images < config.batch_size:
        raise DataError(
            f"batch_size={config.batch_size} exceeds the {counted(num_images, 'image')} of {name} to train on; give "
            f"more, or --batch_size {num_images}"
        )


def keep_held_out(path: Path, held_out: tuple[str, ...], config: AutoencoderTrainingConfig, resumed: bool) -> None:
    """Write the names of the images that are kept for validation.

    Raises ConfigError if a run is resumed that kept others, since it may have been trained on these.
    """
    if resumed and path.exists() and json.loads(path.read_text()) != list(held_out):
        raise ConfigError(
            f"the images of {printable(config.data.name_or_path)} have changed since {path.parent} was begun: those "
            "for validation may have been trained on; choose another --output_dir"
        )
    write_json(path, held_out)


def refuse_overlap(training: ImageDataset, validation: ImageDataset, config: AutoencoderTrainingConfig) -> None:
    """Raise DataError if images to validate on are trained on."""
    seen = set(map(os.path.realpath, training.names))
    same = training.fingerprint == validation.fingerprint  # one table under two names
    both = [name for name in validation.names if same or os.path.realpath(name) in seen]
    if both:
        raise DataError(
            f"{len(both)} of the images of validation {config.validation} are images of data.name_or_path "
            f"{config.data.name_or_path} as well, such as {min(both)}; give images that are not trained on"
        )


def check_start(vae: Autoencoder, images: Images, config: AutoencoderTrainingConfig) -> None:
    """Raise ConfigError unless a saved autoencoder gives back images of their size by finite latents."""
    if config.init_from is None:
        return
    try:
        finite_reconstructions(vae, images.validation[0][None])
    except (FloatingPointError, RuntimeError, ValueError) as error:
        raise ConfigError(f"init_from {config.init_from}: {error}") from error


def run_steps(trainer: AutoencoderTrainer, images: Images, folder: Path, first_step: int, stop: StopRequest) -> None:
    """All steps from the first on: metrics, checkpoints with validation, and the end that a signal asks for."""
    config, num_steps = trainer.config, trainer.config.num_steps
    metrics = MetricsFile(folder / "metrics.jsonl", first_step, enabled=True)
    measured, psnr = images.measured(), {}
    progress = tqdm(range(first_step, num_steps), initial=first_step, total=num_steps, desc="autoencoder")
    for step in progress:
        terms = trainer.step(step, images.training)
        done, stopping, line = step + 1, stop.requested(), {}
        saving = done % config.checkpointing_steps == 0 or done == num_steps or stopping
        if done % LOG_EVERY == 0 or done == num_steps:
            line = {name: round(value.detach().item(), 5) for name, value in terms.items()}
        if saving:
            psnr = {"psnr": validate(trainer.averaged(), measured, folder)}
        if line or saving:
            progress.set_postfix({name: f"{value:.3g}" for name, value in (line | psnr).items()})
            with writing(metrics.path, folder):
                metrics.write({"step": done, **line, **(psnr if saving else {})})
        if saving:
            save_checkpoint(trainer.accelerator, trainer.vae, trainer.ema, folder, done, CHECKPOINTS_KEPT)
        if stopping and done < num_steps:
            print(f"\nstopped at step {done}, saved; run the same command again to go on")
            raise SystemExit(stop.exit_code)


def validate(vae: Autoencoder, measured: Tensor, folder: Path) -> float:
    """PSNR in dB on validation images (N, 3, R, R); the first eight are drawn above their reconstructions."""
    shown = measured[:NUM_SHOWN]
    rows = {"originals": shown, "reconstructions": reconstruct(vae, shown)}
    with writing(folder / "reconstructions.png", folder):
        save_image(labelled_grid(rows, columns=len(shown)), folder / "reconstructions.png")
    return round(psnr_of(vae, measured), 3)
