"""The training loop: a configuration in, a run folder out.

The run folder holds `config.yaml`, `metrics.jsonl`, `checkpoint-{step}/`, and at the end `pipeline/`, `samples.png`
and `losses.png`. Running the same command again resumes. All randomness is keyed by (seed, rank, step), so a resumed
run draws what an uninterrupted one would have drawn.
"""

import json
import math
import os
import shutil
import sys
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from diffusers.utils import is_tensorboard_available, is_wandb_available
from torch import Tensor
from tqdm.auto import tqdm

from latent_dmmd.config import Config, ConfigError, TrainingConfig, as_dict, differing_keys, save_config
from latent_dmmd.data import LatentCache, PictureDataset, cache_latents, load_pictures
from latent_dmmd.discrepancy import get_discrepancy
from latent_dmmd.features import FeatureNet, MeanEmbeddings
from latent_dmmd.flow import measure_embeddings
from latent_dmmd.forward import get_forward_process
from latent_dmmd.latents import Autoencoder, encode_moments, load_autoencoder, reconstruct, to_uint8
from latent_dmmd.objective import DMMD, Batch, Objective, RunningEmbeddings, WitnessMatching
from latent_dmmd.pictures import labelled_grid, plot_losses
from latent_dmmd.pipeline import LatentDMMDPipeline

NUM_MEASURED_PAIRS = 128


def keyed_generator(*key: int) -> torch.Generator:
    """A CPU generator seeded by all of its key."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


def learning_rate_at(step: int, config: TrainingConfig, floor: float = 0.1) -> float:
    """Linear warm-up, then a cosine from the peak to `floor` times it."""
    warmup = min(1.0, (step + 1) / max(1, config.num_warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / config.num_steps)))
    return config.learning_rate * warmup * (floor + (1 - floor) * cosine)


def draw_batch(cache: LatentCache, config: TrainingConfig, num_noise_levels: int, rank: int, step: int) -> Batch:
    """The batch of one step on one rank; the levels are stratified over the grid and the same on every rank."""
    num_levels, num_pairs = config.levels_per_step, config.pairs_per_level
    strata = torch.arange(num_levels) + torch.rand(num_levels, generator=keyed_generator(config.seed, 0, step))
    level = (strata * num_noise_levels / num_levels).long().clamp(max=num_noise_levels - 1)
    generator = keyed_generator(config.seed, 1 + rank, step)
    x_0 = cache.draw(num_levels * num_pairs, generator).unflatten(0, (num_levels, num_pairs))
    eps = torch.randn(x_0.shape, generator=generator)
    return Batch(x_0, level, eps, torch.rand(num_levels, num_pairs, generator=generator))


def build_feature_net(config: Config, latent_shape: tuple[int, int, int]) -> FeatureNet:
    """φ for particles of shape (C, h, w). Raises ConfigError if they are not square or do not fit the network."""
    channels, height, width = latent_shape
    net = config.feature_net
    try:
        if height != width:
            raise ValueError(f"latents must be square; got {height}x{width}")
        return FeatureNet(
            sample_size=height,
            in_channels=channels,
            num_features=net.num_features,
            patch_size=net.patch_size,
            block_out_channels=tuple(net.block_out_channels),
            layers_per_block=net.layers_per_block,
            attention_levels=tuple(net.attention_levels),
        )
    except ValueError as error:
        raise ConfigError(f"feature_net: {error}") from error


def build_objective(config: Config, feature_net: FeatureNet, averaged_net: FeatureNet) -> Objective:
    """The objective that the configuration names."""
    options = config.objective
    process = get_forward_process(options.forward_process)
    discrepancy = get_discrepancy(**options.discrepancy_options())
    if options.name == "dmmd":
        return DMMD(
            feature_net,
            process,
            options.num_noise_levels,
            gradient_weight=options.gradient_weight,
            gradient_center=options.gradient_center,
            feature_weight=options.feature_weight,
            discrepancy=discrepancy,
        )
    return WitnessMatching(
        feature_net,
        process,
        options.num_noise_levels,
        averaged_net=averaged_net,
        mean_embeddings=options.mean_embeddings,
        momentum=options.momentum,
        refresh_every=options.refresh_every,
        discrepancy=discrepancy,
        num_points=options.num_points,
        segment=options.segment,
    )


def prepare_run_folder(config: Config) -> Path:
    """Create the run folder. Raises ConfigError if it holds a run of another configuration, or foreign files."""
    folder = Path(config.output_dir)
    saved = folder / "config.yaml"
    if saved.exists():
        harmless = ("sampling.", "training.checkpoint", "training.log", "data.num_workers", "data.cache_dir")
        changed = [name for name in differing_keys(config, saved) if not name.startswith(harmless)]
        if changed:
            raise ConfigError(f"{folder} holds a run with another {', '.join(changed)}; choose another --output_dir")
    elif folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no run; choose another --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def checkpoints_in(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if p.is_dir() and p.name.split("-")[1].isdigit()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def checkpoint_to_resume(config: Config, folder: Path) -> Path | None:
    """The checkpoint to go on from, or None to start. Raises ConfigError if the one asked for is not there."""
    wanted = config.resume_from_checkpoint
    if wanted not in (None, "latest"):
        if not Path(wanted).is_dir():
            raise ConfigError(f"no checkpoint {wanted}; pass a checkpoint folder or 'latest'")
        return Path(wanted)
    return next(reversed(checkpoints_in(folder)), None)


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, limit: int) -> None:
    """Write a checkpoint aside, rename it, then prune the oldest."""
    final, aside = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(aside)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        for old in checkpoints_in(folder)[:-limit]:
            shutil.rmtree(old)


def use_all_cores() -> None:
    """Undo the one thread that `accelerate launch` gives a single process on a machine without accelerator."""
    if os.environ.get("OMP_NUM_THREADS") == "1" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())


def check_tracker(name: str | None) -> None:
    """Raise ConfigError if a tracker is asked for and not installed; Accelerate would drop it in silence."""
    available = {None: True, "tensorboard": is_tensorboard_available(), "wandb": is_wandb_available()}
    if not available[name]:
        raise ConfigError(f"training.log_with={name} is not installed: pip install {name}")


@torch.no_grad()
def embeddings_for_sampling(
    objective: Objective, feature_net: FeatureNet, cache: LatentCache, config: Config, device: torch.device
) -> MeanEmbeddings:
    """The stored mean embeddings: the running ones where the objective keeps them, measured on the data otherwise."""
    levels, options = objective.levels, config.objective
    means_only = objective.discrepancy.needs_means_only
    embeddings = MeanEmbeddings(
        len(levels),
        feature_net.config.num_features,
        num_points=0 if means_only else options.num_points,
        forward_process=options.forward_process,
        discrepancy=options.discrepancy_options(),
    ).to(device)
    embeddings.levels.copy_(levels)
    embeddings.displacement.copy_(objective.process.displacement(levels))
    source = getattr(objective, "source", None)
    if isinstance(source, RunningEmbeddings) and source.num_updates.all():
        embeddings.clean.copy_(source.clean)
        embeddings.noisy.copy_(source.noisy)
        norms = [embeddings.at_level(k).stored.norm() for k in range(len(levels))]
        embeddings.gradient_scale.copy_(objective.gradient_length() / torch.stack(norms))
        return embeddings

    still = []
    num_pairs = NUM_MEASURED_PAIRS if means_only else options.num_points
    for k in tqdm(range(len(levels)), desc="mean embeddings", unit="level"):
        generator, pairs = keyed_generator(config.training.seed, 0, k), []
        for size in torch.arange(num_pairs).split(32):
            x_0 = cache.draw(len(size), generator)
            eps = torch.randn(x_0.shape, generator=generator)
            x_t = objective.process.sample(x_0, levels[k].cpu().expand(len(x_0)), eps)
            pairs.append((x_0.to(device), x_t.to(device)))
        clean, noisy, scale = measure_embeddings(feature_net, pairs, levels[k], objective.discrepancy)
        embeddings.clean[k], embeddings.noisy[k], embeddings.gradient_scale[k] = clean, noisy, scale
        still += [f"{levels[k].item():.2f}"] if scale == 0 else []
    if still:
        print(f"the witness does not point towards the data at t = {', '.join(still)}: train longer", file=sys.stderr)
    return embeddings


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
    """
    # initialise and validate
    options = config.training
    check_tracker(options.log_with)
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision, log_with=options.log_with, project_dir=config.output_dir
    )
    device = accelerator.device
    if device.type == "cpu" and accelerator.num_processes == 1:
        use_all_cores()
    vae = load_autoencoder(config.autoencoder.name_or_path, device)
    pictures = load_pictures(config.data.name_or_path, config.data.resolution, config.data.image_column)
    latent_shape = tuple(probe_latents(vae, config.data.resolution).shape[1:])
    set_seed(options.seed)
    feature_net = build_feature_net(config, latent_shape)
    with accelerator.main_process_first():
        folder = prepare_run_folder(config)
    resume_from = checkpoint_to_resume(config, folder)

    # load
    cache = cache_latents(
        vae,
        pictures,
        config.data.cache_dir,
        horizontal_flip=config.data.horizontal_flip,
        on_bad_image=config.data.on_bad_image,
        batch_size=config.autoencoder.batch_size,
        num_workers=config.data.num_workers,
    )
    if cache.skipped:
        accelerator.print(f"skipped {len(cache.skipped)} unreadable pictures: {', '.join(cache.skipped[:5])} …")
    if accelerator.is_main_process:
        save_config(config, folder / "config.yaml")

    # build
    averaged_net = deepcopy(feature_net).to(device).eval().requires_grad_(False)
    objective = build_objective(config, feature_net, averaged_net)
    optimizer = torch.optim.Adam(feature_net.parameters(), lr=options.learning_rate, betas=(0.9, 0.99))
    objective, optimizer = accelerator.prepare(objective, optimizer)
    ema = EMAModel(feature_net.parameters(), decay=options.ema_decay, use_ema_warmup=True, power=0.75)
    ema.to(device)
    accelerator.register_for_checkpointing(ema)
    first_step = 0
    if resume_from is not None:
        accelerator.load_state(resume_from)
        first_step = int(resume_from.name.split("-")[1])
        accelerator.print(f"resuming from {resume_from}")
    if options.log_with:
        accelerator.init_trackers("latent_dmmd")

    # train
    metrics = MetricsFile(folder / "metrics.jsonl", first_step, accelerator.is_main_process)
    progress = tqdm(
        range(first_step, options.num_steps),
        initial=first_step,
        total=options.num_steps,
        desc="training",
        disable=not accelerator.is_main_process,
    )
    for step in progress:
        batch = draw_batch(cache, options, config.objective.num_noise_levels, accelerator.process_index, step)
        ema.copy_to(averaged_net.parameters())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, options)
        terms = objective(Batch(*(tensor.to(device) for tensor in batch)))
        accelerator.backward(terms.total)
        norm = accelerator.clip_grad_norm_(feature_net.parameters(), options.max_grad_norm)
        check_finite(step, terms.named, terms.total, norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(feature_net.parameters())

        done = step + 1
        if done % options.log_every == 0 or done == options.num_steps:
            figures = {name: accelerator.reduce(value, "mean").item() for name, value in terms.named.items()}
            progress.set_postfix({name: f"{value:.3g}" for name, value in figures.items()})
            figures |= {"grad_norm": float(norm), "learning_rate": learning_rate_at(step, options)}
            metrics.write({"step": done, **figures})
            accelerator.log(figures, step=done)
        if done % options.checkpointing_steps == 0 or done == options.num_steps:
            save_checkpoint(accelerator, folder, done, options.checkpoints_total_limit)

    # finish
    if accelerator.is_main_process:
        ema.copy_to(averaged_net.parameters())
        embeddings = embeddings_for_sampling(accelerator.unwrap_model(objective), averaged_net, cache, config, device)
        pipeline = LatentDMMDPipeline(
            averaged_net, embeddings, vae, cache.channel_mean.tolist(), cache.channel_std.tolist()
        )
        save_pipeline(pipeline, config, folder / "pipeline", len(cache))
        write_samples(pipeline, pictures, cache.skipped, config, folder)
        plot_losses(folder / "metrics.jsonl", folder / "losses.png")
    accelerator.end_training()
    return folder


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
    if torch.isfinite(total) and torch.isfinite(torch.as_tensor(norm)):
        return
    bad = [name for name, value in named.items() if not torch.isfinite(value)] or ["gradient"]
    raise FloatingPointError(f"step {step}: {', '.join(bad)} not finite; the last checkpoint is from before")


class MetricsFile:
    """metrics.jsonl: one JSON object a line. Lines after the step that a run resumes from are dropped first."""

    def __init__(self, path: Path, first_step: int, enabled: bool) -> None:
        self.path, self.enabled, self.start = path, enabled, time.monotonic()
        self.seconds = 0.0
        if not enabled:
            return
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        kept = [line for line in lines if line["step"] <= first_step]
        self.seconds = kept[-1]["seconds"] if kept else 0.0
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def write(self, figures: dict[str, float]) -> None:
        if not self.enabled:
            return
        seconds = round(self.seconds + time.monotonic() - self.start, 2)
        with self.path.open("a") as file:
            file.write(json.dumps({**figures, "seconds": seconds}) + "\n")


def save_pipeline(pipeline: LatentDMMDPipeline, config: Config, folder: Path, num_pictures: int) -> None:
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
    settings = yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True)
    return f"""---
library_name: diffusers
license: {licence}
pipeline_tag: unconditional-image-generation
---

# Latent DMMD

Noise-conditional features whose MMD gradient flow generates {config.data.resolution}×{config.data.resolution}
pictures in the latent space of a frozen autoencoder. {terms}

Trained on {num_pictures} pictures of `{config.data.name_or_path}`.

```python
from latent_dmmd import LatentDMMDPipeline

pipe = LatentDMMDPipeline.from_pretrained("THIS_FOLDER")
image = pipe().images[0]
```

## Configuration

```yaml
{settings}```
"""


def write_samples(
    pipeline: LatentDMMDPipeline, pictures: PictureDataset, skipped: tuple[str, ...], config: Config, folder: Path
) -> None:
    """`samples.png`: generated pictures above real ones, none of the skipped, and their reconstructions."""
    options = config.sampling
    pipeline.set_progress_bar_config(desc="sampling")
    generated = pipeline(
        batch_size=options.num_images,
        num_noise_levels=options.num_noise_levels,
        steps_per_level=options.steps_per_level,
        sampler=options.sampler,
        generator=torch.Generator().manual_seed(options.seed),
        output_type="pt",
    ).images
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(options.seed)).tolist()
    readable = [i for i in order if pictures.names[i] not in skipped]
    real = torch.stack([pictures[i] for i in readable[:8]])
    nfe = options.num_noise_levels * options.steps_per_level
    rows = {
        f"generated ({options.sampler}, {nfe} NFE)": to_uint8(generated.cpu() * 2 - 1),
        "real": real,
        "real, through the autoencoder": reconstruct(pipeline.vae, real),
    }
    labelled_grid(rows).save(folder / "samples.png")
