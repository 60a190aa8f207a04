"""The training loop: a configuration in, a run folder out.

The run folder holds `config.yaml`, `metrics.jsonl`, `checkpoint-{step}/`, and at the end `pipeline/`, `samples.png`
and `losses.png`. Running the same command again resumes. All randomness is keyed by (seed, rank, step), so a resumed
run draws what an uninterrupted one would have drawn.
"""

import json
import math
import os
import shutil
import signal
import threading
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from diffusers.utils import is_tensorboard_available, is_wandb_available
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from latent_dmmd.cache import LatentCache, PixelCache, cache_latents, cache_pixels
from latent_dmmd.checkpoints import (
    checkpoint_to_resume,
    load_checkpoint,
    pass_over_incomplete,
    save_checkpoint,
    writing,
)
from latent_dmmd.config import ONE_STEP, Config, TrainingConfig, as_dict, differing_keys, save_config
from latent_dmmd.data import Pictures, keyed_generator, load_pictures, write_aside
from latent_dmmd.latents import Autoencoder, encode_moments, load_autoencoder, reconstruct, to_uint8
from latent_dmmd.methods import begin_with, build_network, build_objective, build_pipeline, teacher_pairs
from latent_dmmd.objective import Batch, Terms
from latent_dmmd.pictures import labelled_grid, plot_losses
from latent_dmmd.pipeline import LatentDMMDPipeline, LatentPipeline
from latent_dmmd.utils.errors import ConfigError, DataError
from latent_dmmd.utils.process import own_accelerator


def learning_rate_at(step: int, config: TrainingConfig, floor: float = 0.1) -> float:
    """Linear warm-up, then a cosine from the peak to `floor` times it."""
    warmup = min(1.0, (step + 1) / max(1, config.num_warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / config.num_steps)))
    return config.learning_rate * warmup * (floor + (1 - floor) * cosine)


def draw_batch(
    cache: LatentCache | PixelCache,
    config: TrainingConfig,
    num_noise_levels: int,
    rank: int,
    step: int,
    label_dropout: float = 0.0,
) -> Batch:
    """The batch of one step on one rank; levels, stratified over the grid, and classes are the same on every rank."""
    num_levels, num_pairs = config.levels_per_step, config.pairs_per_level
    shared, generator = keyed_generator(config.seed, 0, step), keyed_generator(config.seed, 1 + rank, step)
    strata = torch.arange(num_levels, device="cpu") + torch.rand(num_levels, generator=shared, device="cpu")
    level = (strata * num_noise_levels / num_levels).long().clamp(max=num_noise_levels - 1)
    label = None
    if cache.labels is None:
        drawn = cache.draw_with_noise(num_levels * num_pairs, generator)
        x_0, eps = (a.unflatten(0, (num_levels, num_pairs)) for a in drawn)
    else:
        num_classes = len(cache.members)
        label = torch.randint(num_classes, (num_levels,), generator=shared, device="cpu")
        label[torch.rand(num_levels, generator=shared, device="cpu") < label_dropout] = num_classes
        wanted = [c if c < num_classes else None for c in label.tolist()]
        x_0 = torch.stack([cache.draw(num_pairs, generator, c) for c in wanted])
        eps = torch.randn(x_0.shape, generator=generator, device="cpu")
    return Batch(x_0, level, eps, torch.rand(num_levels, num_pairs, generator=generator, device="cpu"), label)


def prepare_run_folder(config: Config, may_differ: tuple[str, ...] = ()) -> Path:
    """Create the run folder. Raises ConfigError if it holds a run of another configuration, or foreign files.

    Args:
        config: With an `output_dir`.
        may_differ: Keys that may have changed since the run was started, besides those that never matter.
    """
    folder = Path(config.output_dir)
    saved = folder / "config.yaml"
    if saved.exists():
        harmless = (
            "sampling.",
            "training.checkpoint",
            "training.log",
            "data.num_workers",
            "data.cache_dir",
            *may_differ,
        )
        changed = [name for name in differing_keys(config, saved) if not name.startswith(harmless)]
        if changed:
            raise ConfigError(f"{folder} holds a run with another {', '.join(changed)}; choose another --output_dir")
    elif folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no run; choose another --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_tracker(name: str | None) -> None:
    """Raise ConfigError if a tracker is asked for and not installed; Accelerate would drop it in silence."""
    available = {None: True, "tensorboard": is_tensorboard_available(), "wandb": is_wandb_available()}
    if not available[name]:
        raise ConfigError(f"training.log_with={name} is not installed: pip install {name}")


class Trainer:
    """Network, averaged network, objective and optimiser of a configuration, and one step of them.

    Args:
        config: What to train.
        shape: Shape (C, h, w) of the particles.
        accelerator: Devices, ranks and precision.
        class_names: Names of the particles' classes; empty if there are none.

    Raises:
        ConfigError: If the network does not fit the particles, or the weights it should begin with.
    """

    def __init__(
        self,
        config: Config,
        shape: tuple[int, int, int],
        accelerator: Accelerator,
        class_names: tuple[str, ...] = (),
    ) -> None:
        self.config, self.accelerator, options = config, accelerator, config.training
        self.class_names = class_names
        set_seed(options.seed)
        self.network = build_network(config, shape, len(class_names))
        if options.init_from is not None:
            begin_with(self.network, options.init_from)
        self.averaged_net = deepcopy(self.network).to(accelerator.device).eval().requires_grad_(False)
        objective = build_objective(config, self.network, self.averaged_net)
        optimizer = torch.optim.Adam(self.network.parameters(), lr=options.learning_rate, betas=(0.9, 0.99))
        self.objective, self.optimizer = accelerator.prepare(objective, optimizer)
        self.ema = EMAModel(self.network.parameters(), decay=options.ema_decay, use_ema_warmup=True, power=0.75)
        self.ema.to(accelerator.device)

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step."""
        options = self.config.training
        return learning_rate_at(step, options, floor=1.0 if options.learning_rate_schedule == "constant" else 0.1)

    def step(self, step: int, cache: LatentCache | PixelCache) -> tuple[Terms, Tensor]:
        """One optimiser step: its loss and the norm of its gradient. Raises FloatingPointError, before the update."""
        options, device = self.config.training, self.accelerator.device
        objective, rank = self.config.objective, self.accelerator.process_index
        batch = draw_batch(cache, options, objective.num_noise_levels, rank, step, objective.label_dropout)
        self.averaged()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        terms = self.objective(Batch(*(None if tensor is None else tensor.to(device) for tensor in batch)))
        self.accelerator.backward(terms.total)
        norm = self.accelerator.clip_grad_norm_(self.network.parameters(), options.max_grad_norm)
        check_finite(step, terms.named, terms.total, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.network.parameters())
        return terms, norm

    def averaged(self) -> nn.Module:
        """The averaged network, with the latest averages."""
        self.ema.copy_to(self.averaged_net.parameters())
        return self.averaged_net

    def pipeline(self, vae: Autoencoder | None, cache: LatentCache | PixelCache) -> LatentPipeline:
        """The pipeline of the averaged network."""
        objective = self.accelerator.unwrap_model(self.objective)
        device = self.accelerator.device
        return build_pipeline(self.config, objective, self.averaged(), vae, cache, device, self.class_names)


class StopRequest:
    """Context in which SIGTERM, a cluster's way to say that time is up, is noted instead of obeyed."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator, self.arrived = accelerator, False
        self.in_main_thread = threading.current_thread() is threading.main_thread()  # Python lets no other set handlers

    def __enter__(self) -> "StopRequest":
        if self.in_main_thread:
            self.before = signal.signal(signal.SIGTERM, self.arrive)
        return self

    def __exit__(self, *_: object) -> None:
        if self.in_main_thread:
            signal.signal(signal.SIGTERM, self.before)

    def arrive(self, *_: object) -> None:
        self.arrived = True

    def requested(self) -> bool:
        """Whether it has arrived on any rank; the same on every rank."""
        if self.accelerator.num_processes == 1:
            return self.arrived
        flag = torch.tensor(float(self.arrived), device=self.accelerator.device)
        return self.accelerator.reduce(flag, "sum").item() > 0


def run_steps(
    trainer: Trainer,
    cache: LatentCache | PixelCache,
    vae: Autoencoder | None,
    folder: Path,
    first_step: int,
    stop: StopRequest,
) -> None:
    """All steps from the first on: metrics, checkpoints, a tracker's pictures, and the end that SIGTERM asks for."""
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
        terms, norm = trainer.step(step, cache)
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
                log_pictures(trainer, cache, vae, done)
        if stopping and done < options.num_steps:
            accelerator.print(f"\nstopped at step {done}, saved; run the same command again to go on")
            raise SystemExit(0)


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
        SystemExit: With code 0, after SIGTERM: the step is finished, a checkpoint saved, and a line says how to go on.
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
    pictures = load_pictures(
        config.data.name_or_path, config.data.resolution, config.data.image_column, config.data.streaming
    )
    resolution = config.data.resolution
    shape = tuple(probe_latents(vae, resolution).shape[1:]) if vae else (3, resolution, resolution)
    class_names = pictures.labels()[0] if config.data.class_conditional else ()
    trainer = Trainer(config, shape, accelerator, tuple(class_names))
    with accelerator.main_process_first():
        # at a constant learning rate nothing that was trained depends on the number of steps
        constant = options.learning_rate_schedule == "constant"
        folder = prepare_run_folder(config, ("training.num_steps",) if constant else ())
        pass_over_incomplete(accelerator, folder)
    resume_from = checkpoint_to_resume(folder, config.resume_from_checkpoint, options.num_steps)

    # load
    if config.objective.name == "one-step":
        with accelerator.main_process_first():
            cache = teacher_pairs(config, folder)
    else:
        cache = load_particles(vae, pictures, config)
    if cache.skipped:
        accelerator.print(f"skipped {len(cache.skipped)} unreadable pictures: {', '.join(cache.skipped[:5])} …")
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
        run_steps(trainer, cache, vae, folder, first_step, stop)

    # finish
    if accelerator.is_main_process:
        pipeline = trainer.pipeline(vae, cache)
        with writing(folder / "pipeline", folder):
            save_pipeline(pipeline, config, folder / "pipeline", len(cache))
        samples = sample_grid(pipeline, pictures, cache.skipped, config)
        with writing(folder / "samples.png", folder):
            samples.save(folder / "samples.png")
        with writing(folder / "losses.png", folder):
            plot_losses(folder / "metrics.jsonl", folder / "losses.png")
    accelerator.end_training()
    return folder


def load_particles(vae: Autoencoder | None, pictures: Pictures, config: Config) -> LatentCache | PixelCache:
    """The data as particles: encoded pictures, or pixels without an autoencoder; with their classes if asked for.

    Raises DataError if there are no classes, or all pictures of one could not be read.
    """
    options = config.data
    if vae is None:
        cache = cache_pixels(pictures, options.horizontal_flip, options.on_bad_image)
    else:
        cache = cache_latents(
            vae,
            pictures,
            options.cache_dir,
            horizontal_flip=options.horizontal_flip,
            on_bad_image=options.on_bad_image,
            batch_size=config.autoencoder.batch_size,
            num_workers=options.num_workers,
        )
    if not options.class_conditional:
        return cache
    names, labels = pictures.labels(cache.skipped)
    missing = set(pictures.labels()[0]) - set(names)
    if missing:
        raise DataError(f"no picture of class {', '.join(sorted(missing))} could be read")
    return replace(cache, labels=labels)


@torch.no_grad()
def probe_latents(vae: Autoencoder, resolution: int) -> Tensor:
    """Latents of a grey picture, for their shape. Raises ConfigError if the resolution does not fit the autoencoder."""
    pixels = torch.zeros(1, 3, resolution, resolution, device=next(vae.parameters()).device)
    try:
        return encode_moments(vae, pixels)[0]
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"data.resolution={resolution} does not fit the autoencoder: {error}") from error


def check_finite(step: int, named: dict[str, Tensor], total: Tensor, norm: Tensor) -> None:
    """Raise FloatingPointError, naming step and term, before the update is made."""
    if torch.isfinite(total) and torch.isfinite(torch.as_tensor(norm, device=total.device)):
        return
    bad = [name for name, value in named.items() if not torch.isfinite(value)] or ["gradient"]
    raise FloatingPointError(f"step {step}: {', '.join(bad)} not finite; the last checkpoint is from before")


def readable_lines(path: Path) -> list[dict]:
    """The objects of a file of JSON lines, without a last line that was cut off when its writer was killed."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


class MetricsFile:
    """metrics.jsonl: one JSON object a line. Lines after the step that a run resumes from are dropped first."""

    def __init__(self, path: Path, first_step: int, enabled: bool) -> None:
        self.path, self.enabled, self.start = path, enabled, time.monotonic()
        self.seconds = 0.0
        if not enabled:
            return
        kept = [line for line in readable_lines(path) if line["step"] <= first_step]
        self.seconds = kept[-1]["seconds"] if kept else 0.0
        write_aside(path, lambda aside: aside.write_text("".join(json.dumps(line) + "\n" for line in kept)))

    def write(self, figures: dict[str, float]) -> None:
        if not self.enabled:
            return
        seconds = round(self.seconds + time.monotonic() - self.start, 2)
        with self.path.open("a") as file:
            file.write(json.dumps({**figures, "seconds": seconds}) + "\n")


def save_pipeline(pipeline: LatentPipeline, config: Config, folder: Path, num_pictures: int) -> None:
    """Save a pipeline with its model card, aside and renamed."""
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    pipeline.save_pretrained(aside)
    (aside / "README.md").write_text(model_card(config, num_pictures))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)


def model_card(config: Config, num_pictures: int) -> str:
    """The README of a saved pipeline."""
    elpv = config.data.name_or_path.startswith("elpv")
    licence = "cc-by-nc-sa-4.0" if elpv else "other"
    terms = (
        "The weights derive from the ELPV photographs (Buerhop-Lutz et al., 2018; CC BY-NC-SA 4.0) and follow that "
        "licence: attribution, non-commercial use, share alike."
        if elpv
        else "The weights derive from the data below and follow their terms."
    )
    where = "in the latent space of a frozen autoencoder" if config.autoencoder.name_or_path else "on pixels"
    titles = {"flow-matching": "Flow matching", "ddpm": "DDPM", "mmd-gan": "MMD-GAN", "one-step": "One-step generator"}
    title = titles.get(config.objective.name, "Deep MMD gradient flow")
    what = "A baseline that generates"
    if config.objective.name not in titles:
        what = "Noise-conditional features whose MMD gradient flow generates"
    settings = yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True)
    return f"""---
library_name: diffusers
license: {licence}
pipeline_tag: unconditional-image-generation
---

# {title}

{what} {config.data.resolution}×{config.data.resolution} pictures
{where}. {terms}

Trained on {num_pictures} pictures of `{config.data.name_or_path}`.

```python
from latent_dmmd.pipeline import load_pipeline

pipe = load_pipeline("THIS_FOLDER")
image = pipe().images[0]
```

## Configuration

```yaml
{settings}```
"""


def sampling_options(pipeline: LatentPipeline, config: Config) -> dict:
    """How the configuration asks for pictures to be made, as arguments of the pipeline's call."""
    options = config.sampling
    if isinstance(pipeline, LatentDMMDPipeline):
        return {name: getattr(options, name) for name in ("num_noise_levels", "steps_per_level", "sampler")}
    return dict(
        num_inference_steps=1
        if config.objective.name in ONE_STEP
        else options.num_noise_levels * options.steps_per_level
    )


def log_pictures(trainer: Trainer, cache: LatentCache | PixelCache, vae: Autoencoder | None, step: int) -> None:
    """Send pictures of the averaged network to the trackers, always of the same initial noise."""
    pipeline, options = trainer.pipeline(vae, cache), trainer.config.sampling
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        min(8, options.num_images),
        generator=torch.Generator().manual_seed(options.seed),
        output_type="pt",
        **sampling_options(pipeline, trainer.config),
    ).images.cpu()
    for tracker in trainer.accelerator.trackers:
        tracker.log_images({"samples": images}, step=step)


def sample_grid(pipeline: LatentPipeline, pictures: Pictures, skipped: tuple[str, ...], config: Config) -> Image.Image:
    """Generated pictures above real ones, none of the skipped, and their reconstructions."""
    options, how = config.sampling, sampling_options(pipeline, config)
    pipeline.set_progress_bar_config(desc="sampling")
    generator = torch.Generator().manual_seed(options.seed)
    generated = pipeline(batch_size=options.num_images, generator=generator, output_type="pt", **how).images
    real = pictures.examples(8, options.seed, skipped)
    nfe = how.get("num_inference_steps") or options.num_noise_levels * options.steps_per_level
    label = f"generated ({how.get('sampler', config.objective.name)}, {nfe} NFE)"
    rows = {label: to_uint8(generated.cpu() * 2 - 1), "real": real}
    if pipeline.vae is not None:
        rows["real, through the autoencoder"] = reconstruct(pipeline.vae, real)
    return labelled_grid(rows)
