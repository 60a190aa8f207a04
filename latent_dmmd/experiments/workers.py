"""Stages of a comparison that run in processes of their own, whose memory and threads leave nothing behind."""

import multiprocessing
import os
import platform
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, redirect_stderr
from dataclasses import replace
from functools import partial
from io import StringIO

import torch
from accelerate import Accelerator

from latent_dmmd.data.autoencoder import Autoencoder, load_autoencoder
from latent_dmmd.data.particles import LatentCache, Particles, PixelCache
from latent_dmmd.experiments.compare import DECODE
from latent_dmmd.latent_pipeline import FlowOptions, LatentPipeline
from latent_dmmd.methods.witness import WitnessConfig
from latent_dmmd.pipeline import load_pipeline
from latent_dmmd.training.config import Config
from latent_dmmd.training.loop import train
from latent_dmmd.training.setup import probe_latents
from latent_dmmd.training.trainer import Trainer
from latent_dmmd.utils.benchmark import measure, peak_memory_mb
from latent_dmmd.utils.process import default_device, own_accelerator

CALIBRATION_STEPS = 4  # as many as lie between two refreshes of running means


def sampling_costs(
    sources: dict[str, Config | str],
    ways: dict[str, tuple[str, dict]],
    dmmd: str,
    nfe: int = 5,
    num_images: int = 32,
) -> dict[str, dict]:
    """Seconds and peak memory of one NFE per image for every way, an entry and options; and of decoding one.

    Args:
        sources: What each entry samples with: a configuration, of which random weights are made, or a saved pipeline.
        ways: What a way is called to the entry and the arguments of the pipeline's call.
        dmmd: The entry whose particles are decoded.
        nfe: NFE of a turn.
        num_images: Images of a turn.
    """
    pipes = {
        name: untrained_pipeline(source, nfe) if isinstance(source, Config) else load_pipeline(source)
        for name, source in sources.items()
    }
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
        pipe.flow_options = FlowOptions(chunk_size=None)
    steps = {name: 1 if pipe.one_step else nfe for name, pipe in pipes.items()}
    z = pipes[dmmd].initial_particles(num_images, torch.Generator().manual_seed(0))
    tasks = {
        label: partial(pipes[name], num_images, steps[name], output_type="latent", **options)
        for label, (name, options) in ways.items()
    }
    tasks[DECODE] = partial(pipes[dmmd].decode, z, "pt")
    costs = measure(tasks, pipes[dmmd].device, repeats=7)
    each = {DECODE: num_images} | {label: num_images * steps[name] for label, (name, _) in ways.items()}
    return {label: {"seconds": cost.seconds / each[label], "peak_mb": cost.peak_mb} for label, cost in costs.items()}


def machine() -> dict:
    """What the figures were measured on."""
    gpu = torch.cuda.get_device_name() if default_device().type == "cuda" else None
    return {"gpu": gpu, "threads": torch.get_num_threads(), "torch": torch.__version__, "system": platform.system()}


def in_a_process(function, *args):
    """The function's value from a process of its own, whose memory and threads leave nothing behind."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=end_with_parent, initargs=(os.getpid(),)) as pool:
        return pool.submit(function, *args).result()


def end_with_parent(parent: int) -> None:
    """Send this process SIGTERM when its parent is gone: a killed comparison leaves nothing running.

    Training notes the first, saves a checkpoint and ends; the process, which would wait for more work, obeys the next.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        while True:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    threading.Thread(target=watch, daemon=True).start()


def train_and_measure(config: Config) -> float:
    """Train; the peak memory in MB: of the GPU, or of this process."""
    train(config)
    return peak_memory_mb(default_device())


def step_costs(configs: dict[str, Config], repeats: int = 5) -> dict[str, dict]:
    """Seconds and parameters of a training step of each configuration, on particles that are noise, taking turns.

    Raises ConfigError if the configurations have several precisions, which one process cannot have at a time.
    """
    with ExitStack() as stack:
        tasks, sizes = {}, {}
        for name, config in configs.items():
            accelerator = stack.enter_context(own_accelerator(config.training.mixed_precision))
            trainer, particles, _ = untrained(config, accelerator)
            sizes[name] = sum(p.numel() for p in trainer.network.parameters())

            def task(trainer: Trainer = trainer, particles: Particles = particles) -> None:
                for step in range(CALIBRATION_STEPS):
                    trainer.step(step, particles)

            tasks[name] = task
        costs = measure(tasks, accelerator.device, repeats)
    return {
        name: {"seconds": costs[name].seconds / CALIBRATION_STEPS, "num_parameters": sizes[name]} for name in configs
    }


def untrained(config: Config, accelerator: Accelerator) -> tuple[Trainer, Particles, Autoencoder | None]:
    """What trains by a configuration, 64 particles of its shape that are noise, and its autoencoder if it has one."""
    side, generator, vae = config.data.resolution, torch.Generator().manual_seed(0), None
    if config.autoencoder.name_or_path:
        vae = load_autoencoder(config.autoencoder.name_or_path, accelerator.device)
        z = torch.randn(64, 1, *probe_latents(vae, side).shape[1:], generator=generator, device="cpu")
        particles = LatentCache(((z, None),), z.new_zeros(z.shape[2]), z.new_ones(z.shape[2]))
    else:
        images = torch.randint(256, (64, 3, side, side), dtype=torch.uint8, generator=generator, device="cpu")
        zeros, ones = torch.zeros(3, device="cpu"), torch.ones(3, device="cpu")
        particles = PixelCache(images, config.data.horizontal_flip, zeros, ones)
    return Trainer(config, tuple(particles.draw(1, generator).shape[1:]), accelerator), particles, vae


def untrained_pipeline(config: Config, num_noise_levels: int) -> LatentPipeline:
    """A pipeline of random weights, which takes the time of a trained one; one that has noise levels, with so many."""
    if isinstance(config.objective, WitnessConfig):
        fewer = {"num_noise_levels": num_noise_levels}
        objective, sampling = replace(config.objective, **fewer), replace(config.sampling, **fewer)
        config = replace(config, objective=objective, sampling=sampling)
    with own_accelerator(config.training.mixed_precision) as accelerator, redirect_stderr(StringIO()):
        # without the advice to train longer
        trainer, particles, vae = untrained(config, accelerator)
        return trainer.pipeline(vae, particles)
