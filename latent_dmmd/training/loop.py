"""The training loop: a configuration in, a run folder out.

The run folder holds `config.yaml`, `metrics.jsonl`, `checkpoint-{step}/`, and at the end `pipeline/`, `samples.png`
and `losses.png`. Running the same command again resumes. All randomness is keyed by (seed, rank, step), so a resumed
run draws what an uninterrupted one would have drawn.
"""

import signal
import threading
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.utils import is_tensorboard_available, is_wandb_available
from torch import Tensor
from tqdm.auto import tqdm

from latent_dmmd.data.autoencoder import Autoencoder, encode_moments, load_autoencoder
from latent_dmmd.data.particles import LatentCache, Particles, PixelCache, cache_latents, cache_pixels
from latent_dmmd.data.sources import ImageSource, describe, load_images
from latent_dmmd.training.checkpoints import (
    checkpoint_to_resume,
    load_checkpoint,
    pass_over_incomplete,
    prepare_run_folder,
    save_checkpoint,
    writing,
)
from latent_dmmd.training.config import Config, save_config
from latent_dmmd.training.metrics_file import MetricsFile, plot_losses
from latent_dmmd.training.publishing import log_samples, sample_grid, save_pipeline
from latent_dmmd.training.trainer import Trainer
from latent_dmmd.utils.errors import ConfigError, DataError
from latent_dmmd.utils.process import own_accelerator


def check_tracker(name: str | None) -> None:
    """Raise ConfigError if a tracker is asked for and not installed; Accelerate would drop it in silence."""
    available = {None: True, "tensorboard": is_tensorboard_available(), "wandb": is_wandb_available()}
    if not available[name]:
        raise ConfigError(f"training.log_with={name} is not installed: pip install {name}")


class StopRequest:
    """Context in which SIGTERM, a cluster's way to say that time is up, and Ctrl-C are noted instead of obeyed.

    A second Ctrl-C is obeyed.
    """

    signals = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator, self.arrived = accelerator, 0
        self.in_main_thread = threading.current_thread() is threading.main_thread()  # Python lets no other set handlers

    def __enter__(self) -> "StopRequest":
        if self.in_main_thread:
            self.before = {number: signal.signal(number, self.arrive) for number in self.signals}
        return self

    def __exit__(self, *_: object) -> None:
        if self.in_main_thread:
            for number, handler in self.before.items():
                signal.signal(number, handler)

    def arrive(self, number: int, _: object) -> None:
        if number == self.arrived == signal.SIGINT:
            raise KeyboardInterrupt
        self.arrived = number

    @property
    def exit_code(self) -> int:
        """0 after SIGTERM, which a cluster sends to end a job in order; 130 after Ctrl-C, as of any command."""
        return 130 if self.arrived == signal.SIGINT else 0

    def requested(self) -> bool:
        """Whether it has arrived on any rank; the same on every rank."""
        if self.accelerator.num_processes == 1:
            return bool(self.arrived)
        flag = torch.tensor(float(bool(self.arrived)), device=self.accelerator.device)
        return self.accelerator.reduce(flag, "sum").item() > 0


def run_steps(
    trainer: Trainer,
    particles: Particles,
    vae: Autoencoder | None,
    folder: Path,
    first_step: int,
    stop: StopRequest,
) -> None:
    """All steps from the first on: metrics, checkpoints, a tracker's images, and the end that a signal asks for."""
    accelerator, options = trainer.accelerator, trainer.config.training
    metrics = MetricsFile(folder / "metrics.jsonl", first_step, accelerator.is_main_process)
    progress = tqdm(
        range(first_step, options.num_steps),
        initial=first_step,
        total=options.num_steps,
        desc="training",
        disable=not accelerator.is_main_process,
    )
    for step in progress:
        terms, norm = trainer.step(step, particles)
        done = step + 1
        if done % options.log_every == 0 or done == options.num_steps:
            figures = {name: accelerator.reduce(value, "mean").item() for name, value in terms.named.items()}
            progress.set_postfix({name: f"{value:.3g}" for name, value in figures.items()})
            figures |= {"grad_norm": float(norm), "learning_rate": trainer.learning_rate(step)}
            with writing(metrics.path, folder):
                metrics.write({"step": done, **figures})
            accelerator.log(figures, step=done)
        stopping = stop.requested()
        if done % options.checkpointing_steps == 0 or done == options.num_steps or stopping:
            save_checkpoint(accelerator, trainer.network, trainer.ema, folder, done, options.checkpoints_total_limit)
            progress.set_description(f"training (saved: {done})")
            if accelerator.trackers and accelerator.is_main_process:
                log_samples(trainer, particles, vae, done)
        if stopping and done < options.num_steps:
            accelerator.print(f"\nstopped at step {done}, saved; run the same command again to go on")
            raise SystemExit(stop.exit_code)


def train(config: Config) -> Path:
    """Train φ and write the run folder.

    Args:
        config: What to do.

    Returns:
        The run folder.

    Raises:
        ConfigError: If the configuration cannot be followed; nothing is written then.
        DataError: If the data cannot be read.
        FloatingPointError: If a loss or gradient is not finite; the last checkpoint stays.
        SystemExit: After SIGTERM, with code 0, or Ctrl-C, with code 130: the step is finished, a checkpoint saved, and
            a line says how to go on.
    """
    check_tracker(config.training.log_with)
    options = dict(log_with=config.training.log_with, project_dir=config.output_dir)
    with own_accelerator(config.training.mixed_precision, **options) as accelerator:
        return train_with(config, accelerator)


def train_with(config: Config, accelerator: Accelerator) -> Path:
    """`train` on the devices, ranks and precision of an Accelerator."""
    # initialise and validate
    options, device = config.training, accelerator.device
    name = config.autoencoder.name_or_path
    vae = load_autoencoder(name, device) if name else None
    source = load_images(
        config.data.name_or_path, config.data.resolution, config.data.image_column, config.data.streaming
    )
    accelerator.print(describe(source))
    resolution = config.data.resolution
    shape = tuple(probe_latents(vae, resolution).shape[1:]) if vae else (3, resolution, resolution)
    class_names = source.labels()[0] if config.data.class_conditional else ()
    trainer = Trainer(config, shape, accelerator, tuple(class_names))
    with accelerator.main_process_first():
        # at a constant learning rate nothing that was trained depends on the number of steps
        constant = options.learning_rate_schedule == "constant"
        folder = prepare_run_folder(config, ("training.num_steps",) if constant else ())
        pass_over_incomplete(accelerator, folder)
    resume_from = checkpoint_to_resume(folder, config.resume_from_checkpoint, options.num_steps)

    # load
    with accelerator.main_process_first():
        particles = trainer.method.own_particles(folder, options.seed)
    if particles is None:
        particles = load_particles(vae, source, config)
    if particles.skipped:
        accelerator.print(f"skipped {len(particles.skipped)} unreadable images: {', '.join(particles.skipped[:5])} …")
    if accelerator.is_main_process:
        save_config(config, folder / "config.yaml")

    first_step = 0
    if resume_from is not None:
        first_step = load_checkpoint(accelerator, trainer.network, trainer.ema, resume_from)
        accelerator.print(f"resuming from {resume_from}")
    if options.log_with:
        accelerator.init_trackers("latent_dmmd")

    # train
    with StopRequest(accelerator) as stop:
        run_steps(trainer, particles, vae, folder, first_step, stop)

    # finish
    if accelerator.is_main_process:
        pipeline = trainer.pipeline(vae, particles)
        with writing(folder / "pipeline", folder):
            save_pipeline(pipeline, config, folder / "pipeline", len(particles))
        samples = sample_grid(pipeline, source, particles.skipped, config)
        with writing(folder / "samples.png", folder):
            samples.save(folder / "samples.png")
        with writing(folder / "losses.png", folder):
            plot_losses(folder / "metrics.jsonl", folder / "losses.png")
    accelerator.end_training()
    return folder


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
