"""The training loop: a configuration in, a run folder out.

The run folder holds `config.yaml`, `metrics.jsonl`, `checkpoint-{step}/`, and at the end `pipeline/`, `samples.png`
and `losses.png`. Running the same command again resumes. All randomness is keyed by (seed, rank, step), so a resumed
run draws what an uninterrupted one would have drawn.
"""

import signal
import threading
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from latent_dmmd.data.autoencoder import Autoencoder
from latent_dmmd.data.particles import Particles
from latent_dmmd.data.sources import describe
from latent_dmmd.training.checkpoints import (
    check_run_folder,
    checkpoint_to_resume,
    checkpoints_in,
    load_checkpoint,
    pass_over_incomplete,
    prepare_run_folder,
    save_checkpoint,
    step_of,
    writing,
)
from latent_dmmd.training.config import Config, save_config
from latent_dmmd.training.dry_run import dry_run
from latent_dmmd.training.first_look import first_look
from latent_dmmd.training.metrics_file import MetricsFile, plot_losses
from latent_dmmd.training.publishing import log_samples, sample_grid, save_pipeline
from latent_dmmd.training.setup import check_tracker, load_particles, may_differ, set_up
from latent_dmmd.training.trainer import Trainer
from latent_dmmd.utils.process import own_accelerator, precision_and_reason


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
            accelerator.print(f"\nstopped at step {done}, saved; {way_to_go_on(trainer.config)}")
            raise SystemExit(stop.exit_code)


def way_to_go_on(config: Config) -> str:
    """What to do about a run that was stopped."""
    if config.resume_from_checkpoint in (None, "latest"):
        return "run the same command again to go on"
    return "run it with --resume_from_checkpoint latest to go on"


def train(config: Config) -> Path:
    """Train φ and write the run folder; with `dry_run`, say what would happen and write nothing.

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
        return dry_run(config, accelerator) if config.dry_run else train_with(config, accelerator)


def train_with(config: Config, accelerator: Accelerator) -> Path:
    """`train` on the devices, ranks and precision of an Accelerator."""
    # initialise and validate
    options = config.training
    accelerator.print("mixed precision: {} ({})".format(*precision_and_reason(options.mixed_precision)))
    for note in options.notes():
        accelerator.print(f"note: {note}")
    check_run_folder(config, may_differ(options))
    vae, source, _, trainer = set_up(config, accelerator)
    lines, fit = first_look(vae, source, config) if accelerator.is_main_process else ([], None)
    accelerator.print("\n".join([describe(source), *lines]))
    folder = Path(config.output_dir)
    with accelerator.main_process_first():
        if accelerator.is_main_process:  # alone: what it writes must not be foreign files to another
            prepare_run_folder(config, may_differ(options))
            pass_over_incomplete(accelerator, folder)
    resume_from = checkpoint_to_resume(folder, config.resume_from_checkpoint, options.num_steps)

    # load
    with accelerator.main_process_first():
        if trainer.method.makes_particles() and accelerator.is_main_process:
            save_config(config, folder / "config.yaml")  # first: another run must not go on with some of them
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
        accelerator.print(f"resuming from {resume_from}, at step {first_step}")
        later = [checkpoint.name for checkpoint in checkpoints_in(folder) if step_of(checkpoint) > first_step]
        if later:
            accelerator.print(f"note: the next checkpoint takes the place of {', '.join(later)}")
    elif config.resume_from_checkpoint == "latest":
        accelerator.print(f"no checkpoint in {folder} yet: starting at step 0")
    if options.log_with:
        accelerator.init_trackers("latent_dmmd")

    # train
    with StopRequest(accelerator) as stop:
        run_steps(trainer, particles, vae, folder, first_step, stop)

    # finish
    if accelerator.is_main_process:
        pipeline = trainer.pipeline(vae, particles)
        with writing(folder / "pipeline", folder):
            save_pipeline(pipeline, config, folder / "pipeline", len(particles), fit)
        samples = sample_grid(pipeline, source, particles.skipped, config)
        with writing(folder / "samples.png", folder):
            samples.save(folder / "samples.png")
        with writing(folder / "losses.png", folder):
            plot_losses(folder / "metrics.jsonl", folder / "losses.png")
        print(f"\nimages:   {folder / 'samples.png'}   pipeline: {folder / 'pipeline'}")
        print(f"next:     latent-dmmd sample --pipeline {folder / 'pipeline'} --num_images 64 --output_dir samples")
    accelerator.end_training()
    return folder
