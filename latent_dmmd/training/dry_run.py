"""What a run would do and need, found out without writing: do its parts fit, how long, how much memory and disk."""

import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from latent_dmmd.data.particles import LatentCache, PixelCache, cache_manifest, encode_shard
from latent_dmmd.data.shards import (
    cache_folder,
    check_manifest,
    counted_images,
    none_readable,
    num_known,
    readable,
    shard_path,
)
from latent_dmmd.data.sources import ImageSource, describe
from latent_dmmd.training.checkpoints import (
    check_run_folder,
    checkpoint_to_resume,
    checkpoints_in,
    nearest_writable,
    steps_done,
)
from latent_dmmd.training.config import Config, DataConfig
from latent_dmmd.training.first_look import first_look
from latent_dmmd.training.setup import Setup, may_differ, set_up
from latent_dmmd.training.trainer import Trainer
from latent_dmmd.utils.benchmark import measure, peak_memory_mb
from latent_dmmd.utils.images import to_pixels
from latent_dmmd.utils.process import precision_and_reason

TIMED_STEPS = 4  # running means are refreshed in one of four


def dry_run(config: Config, accelerator: Accelerator) -> Path:
    """Check a configuration, train a few steps of a network that is thrown away, and print what the run would do.

    Returns:
        The run folder, which need not be there.

    Raises:
        ConfigError, DataError, ValueError, FloatingPointError: As the run itself would.
        OSError: If the run folder or the cache could not be written, or there is too little room.
    """
    options = config.training
    folder = check_run_folder(config, may_differ(options))
    parts = set_up(config, accelerator)
    resume_from = checkpoint_to_resume(folder, config.resume_from_checkpoint, options.num_steps)
    network = parts.trainer.network
    lines, _ = first_look(parts.vae, parts.source, config) if accelerator.is_main_process else ([], None)
    particles, seconds_per_image = few_particles(parts, config)
    plan = {
        "mixed precision": "{} ({})".format(*precision_and_reason(options.mixed_precision)),
        "images": "the first can be read",
        "particles": " × ".join(map(str, parts.shape)) + (", latents" if parts.vae else ", pixels") + ", finite",
        **data_plan(parts, particles, seconds_per_image, config),
        "network": f"{sum(p.numel() for p in network.parameters()):,} parameters ({type(network).__name__})",
    }

    seconds = seconds_per_step(parts.trainer, particles)
    done = 0 if resume_from is None else steps_done(resume_from)
    left = options.num_steps - done
    plan["training"] = f"{left} steps of {seconds:.2g} s, about {duration(left * seconds)}"
    peak = peak_memory_mb(accelerator.device)
    plan["peak memory"] = "not known here" if peak is None else f"{peak:,.0f} MB"
    one, kept = checkpoint_mb(parts.trainer), options.checkpoints_total_limit
    # one more than is kept, since the oldest goes when the next is there
    needed = one * (kept + 1 - min(kept, len(checkpoints_in(folder)))) + pipeline_mb(parts)
    plan["run folder"] = f"{room(folder, needed, 'output_dir')} ({kept} + 1 checkpoints of {one:,.0f} MB, pipeline)"
    if resume_from is None:
        plan["would"] = f"start at step 0 in {folder}"
    elif left:
        plan["would"] = f"resume from {resume_from}, at step {done} of {options.num_steps}"
    else:
        plan["would"] = f"make pipeline and images again from {resume_from}: all {done} steps are done"
    if options.notes():
        plan["note"] = "; ".join(options.notes())
    accelerator.print("dry run: nothing is written")
    accelerator.print("\n".join([describe(parts.source), *lines]))
    accelerator.print("\n".join(f"{name + ':':17}{value}" for name, value in plan.items()))
    return folder


def few_particles(parts: Setup, config: Config) -> tuple[LatentCache | PixelCache, float]:
    """Particles of the first images that can be read, and the seconds that each image took.

    Raises DataError or FloatingPointError as reading and encoding all of them would.
    """
    start, data = time.perf_counter(), config.data
    images = first_images(parts.source, data, config.autoencoder.batch_size)
    if parts.vae is None:
        images_uint8 = torch.stack(list(images.values()))
        pixels = to_pixels(images_uint8)
        mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3)).clamp(min=1e-6)
        cache = PixelCache(images_uint8, data.horizontal_flip, mean, std)
    else:
        batches = iter([list(images.items())])
        hidden = tqdm(disable=True)
        tensors, _, _ = encode_shard(parts.vae, batches, data.horizontal_flip, data.on_bad_image, hidden)
        latents = tensors["mean"]
        mean, std = latents.mean((0, 1, 3, 4)), latents.std((0, 1, 3, 4)).clamp(min=1e-6)
        cache = LatentCache(((latents, tensors.get("std")),), mean, std)
    seconds = (time.perf_counter() - start) / len(images)
    num_classes = len(parts.trainer.class_names)
    if num_classes:
        cache = with_classes(cache, num_classes)
    return cache, seconds


def with_classes(cache: LatentCache | PixelCache, num_classes: int) -> LatentCache | PixelCache:
    """The particles, repeated until every class has one."""
    index = torch.arange(max(len(cache), num_classes), device="cpu")
    rows, labels = index % len(cache), index % num_classes
    if isinstance(cache, PixelCache):
        return replace(cache, images_uint8=cache.images_uint8[rows], labels=labels)
    shards = tuple((mean[rows], None if std is None else std[rows]) for mean, std in cache.shards)
    return replace(cache, shards=shards, labels=labels)


def first_images(source: ImageSource, data: DataConfig, batch_size: int) -> dict[str, Tensor]:
    """The first batch with images that can be read, by their names. Raises DataError if there is none."""
    skipped = []
    for items in source.batches(0, sys.maxsize, batch_size):
        images = readable(items, data.on_bad_image, skipped)
        if images:
            return images
    raise none_readable(skipped)


def data_plan(parts: Setup, particles: LatentCache | PixelCache, seconds_per_image: float, config: Config) -> dict:
    """What becomes of the images before training, in lines by name. Raises DataError for a cache of something else."""
    count, data = num_known(parts.source), config.data
    if parts.trainer.method.makes_particles():
        return {"encoding": f"none: {config.objective.name} makes its own particles first, in the run folder"}
    if parts.vae is None:
        size = count and f", {count * particles.images_uint8[0].numel() / 2**20:,.0f} MB in memory"
        return {"reading": f"{seconds_per_image:.2g} s per image" + (size or "")}
    manifest = cache_manifest(parts.vae, parts.source, data.horizontal_flip)
    folder = cache_folder(manifest, data.cache_dir)
    begun = check_manifest(folder, manifest)
    count = (counted_images(folder) if begun else None) or count
    if count is None:
        return {"encoding": f"{seconds_per_image:.2g} s per image; the length of a stream is not known"}
    size = manifest["shard_size"]
    left = sum(min(size, count - i) for i in range(0, count, size) if not shard_path(folder, i).exists())
    if not left:
        return {"encoding": f"none: all latents are in {folder}"}
    mb_per_image = megabytes(a[0] for a in particles.shards[0] if a is not None)
    return {
        "encoding": f"{left} images of {seconds_per_image:.2g} s, about {duration(left * seconds_per_image)}",
        "cache": room(folder, left * mb_per_image, "data.cache_dir"),
    }


def seconds_per_step(trainer: Trainer, particles: LatentCache | PixelCache) -> float:
    """Seconds of a step, after some to warm up. Raises FloatingPointError if a loss or gradient is not finite."""

    def steps() -> None:
        for step in range(TIMED_STEPS):
            trainer.step(step, particles)

    return measure({"steps": steps}, trainer.accelerator.device, repeats=1)["steps"].seconds / TIMED_STEPS


def checkpoint_mb(trainer: Trainer) -> float:
    """Size of a checkpoint of a trainer that has done a step: weights, Adam's two moments, averages."""
    moments = [a for state in trainer.optimizer.state_dict()["state"].values() for a in state.values()]
    weights = trainer.accelerator.unwrap_model(trainer.objective).state_dict().values()
    return megabytes([*moments, *weights, *trainer.ema.shadow_params])


def pipeline_mb(parts: Setup) -> float:
    """Size of the saved pipeline: network and autoencoder."""
    return megabytes([*parts.trainer.network.parameters(), *(parts.vae.parameters() if parts.vae else ())])


def megabytes(tensors: Iterable[Tensor]) -> float:
    return sum(a.numel() * a.element_size() for a in tensors) / 2**20


def room(folder: Path, needed_mb: float, key: str) -> str:
    """What a folder needs and has, in MB. Raises OSError if it cannot be written or that is too little."""
    free = shutil.disk_usage(nearest_writable(folder, key)).free / 2**20
    if free < needed_mb:
        raise OSError(f"cannot write {folder}: needs {needed_mb:,.0f} MB, {free:,.0f} MB are free; pass another {key}")
    return f"{needed_mb:,.0f} MB of {free:,.0f} MB that are free in {folder}"


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
