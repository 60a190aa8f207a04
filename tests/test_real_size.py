"""The main job at its real size, on whatever machine this is: a minute or two on two cores.

configs/celebahq256_latent.yaml needs the hub and a GPU. Here its network, objective and path are run for two steps with
the architecture of its autoencoder, random weights and generated images, at fewer pairs a step, and what the job costs
is counted: floating point operations, which no machine changes, and bytes that the backward pass keeps.
"""

import json
import resource
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from latent_dmmd.methods import witness
from latent_dmmd.pipeline import LatentDMMDPipeline, load_pipeline
from latent_dmmd.training.config import Config, parse_config
from latent_dmmd.training.loop import train
from latent_dmmd.training.trainer import Trainer
from latent_dmmd.utils.benchmark import PeakMemory
from latent_dmmd.utils.process import default_device, resolved_precision

CONFIG = Path(__file__).parents[1] / "configs" / "celebahq256_latent.yaml"
PAIRS_PER_LEVEL = 2  # of 16, so that two steps take seconds and not minutes
NUM_IMAGES, SIDE = 8, 256
COPIES = 6  # of the weights in float32: themselves, gradients, two moments of Adam, averages, the averaged network

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore:This DataLoader will create 8 worker processes")]


@pytest.fixture
def folder(tmp_path):
    """A gigabyte of files, which are not left behind."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def save_autoencoder(path):
    """The architecture of stabilityai/sd-vae-ft-mse, 3 × 256 × 256 pixels to 4 × 32 × 32 latents, at random."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32,
        sample_size=256,
    )
    vae.save_pretrained(path)
    return sum(parameter.numel() for parameter in vae.parameters())


def save_images(path):
    path.mkdir()
    coarse = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 8, 8, 3), dtype=np.uint8)
    for i, pixels in enumerate(coarse):
        Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path / f"{i}.png")


def peak_resident_mb():
    """The highest resident set of this process, since `PeakMemory` reset it last if it did."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**10 if sys.platform != "darwin" else 2**20)


class Meter:
    """What training steps cost: the first is counted, the others are timed.

    Attributes:
        flops: Floating point operations of the first step.
        saved_bytes: What its forward passes keep for its backward passes, but for the parameters.
        seconds: Of each later step.
        peak_mb: Growth of the resident set in each later step, at its highest.
        resident_mb: The highest resident set of the process before the last step.
    """

    def __init__(self):
        self.flops, self.saved_bytes, self.num_parameters = None, 0, None
        self.seconds, self.peak_mb, self.resident_mb = [], [], 0.0

    def step(self, trainer, number, particles):
        if self.flops is not None:
            self.resident_mb = max(self.resident_mb, peak_resident_mb())
            start = time.perf_counter()
            with PeakMemory(trainer.accelerator.device) as peak:
                result = STEP(trainer, number, particles)
            self.seconds.append(time.perf_counter() - start)
            self.peak_mb.append(peak.mb)
            return result
        parameters = list(trainer.network.parameters())
        self.num_parameters = sum(parameter.numel() for parameter in parameters)
        seen = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        kept = []  # while it is, no other storage gets its address

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                kept.append(storage)
                self.saved_bytes += storage.nbytes()
            return tensor.detach()

        counter = FlopCounterMode(display=False)
        with counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = STEP(trainer, number, particles)
        self.flops = counter.get_total_flops()
        return result


STEP = Trainer.step


def forward_flops(net):
    """Of φ for one particle."""
    config, device = net.config, next(net.parameters()).device
    x = torch.zeros(1, config.in_channels, config.sample_size, config.sample_size, device=device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(x, torch.ones((), device=device))
    return counter.get_total_flops()


def test_the_main_job_end_to_end(folder, monkeypatch, capsys, record_property):
    num_autoencoder_parameters = save_autoencoder(folder / "vae")
    save_images(folder / "images")
    meter = Meter()
    monkeypatch.setattr(Trainer, "step", lambda trainer, number, particles: meter.step(trainer, number, particles))
    # 50 levels are measured after training: with a few particles each instead of 128, which takes half an hour
    monkeypatch.setattr(witness, "NUM_MEASURED_PAIRS", 2)
    monkeypatch.setattr(witness, "NUM_CALIBRATION_PARTICLES", 2)
    options = {
        "config": CONFIG,
        "data.name_or_path": folder / "images",
        "data.cache_dir": folder / "cache",
        "autoencoder.name_or_path": folder / "vae",
        "output_dir": folder / "run",
        "training.num_steps": 2,
        "training.pairs_per_level": PAIRS_PER_LEVEL,
        "sampling.num_images": 2,
        "sampling.num_noise_levels": 2,
        "sampling.steps_per_level": 1,
    }
    config = parse_config(Config, [f"--{name}={value}" for name, value in options.items()])
    start = time.perf_counter()
    run = train(config)
    train_seconds = time.perf_counter() - start

    pipe = load_pipeline(run / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe, LatentDMMDPipeline) and pipe.resolution == SIDE
    assert len(pipe.mean_embeddings.levels) == config.objective.num_noise_levels == 50
    start = time.perf_counter()
    images = pipe(2, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
    sample_seconds = time.perf_counter() - start
    assert images.shape == (2, 3, SIDE, SIDE) and images.isfinite().all() and images.std() > 0
    losses = [json.loads(line)["matching"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses and all(0 < loss < 10 for loss in losses)
    assert Image.open(run / "samples.png").width == 8 * SIDE

    # what a step costs here, and what one of the configured size should cost on a GPU
    configured = parse_config(Config, ["--config", str(CONFIG)])
    pairs = config.training.levels_per_step * config.training.pairs_per_level
    configured_pairs = configured.training.levels_per_step * configured.training.pairs_per_level
    # a step that refreshes the running means, as the first ones do, has two forwards of each pair more
    refresh = 2 * forward_flops(pipe.feature_net) * pairs
    flops = meter.flops - refresh * (1 - 1 / config.objective.refresh_every)
    scale = configured_pairs / pairs
    peak_mb = max(meter.resident_mb, peak_resident_mb())
    weights_mb = COPIES * 4 * meter.num_parameters / 2**20
    # from what must be kept to what was in use here, scratch space of the CPU's kernels included
    in_use = [meter.saved_bytes / 2**20, meter.peak_mb[0] or 0.0]
    estimated_gb = [round((weights_mb + scale * mb) / 2**10, 1) for mb in in_use]
    figures = {
        "device": str(default_device()),
        "threads": torch.get_num_threads(),
        "precision": {"no": "float32"}.get(resolved_precision("auto"), resolved_precision("auto")),
        "parameters": meter.num_parameters,
        "parameters of the autoencoder": num_autoencoder_parameters,
        "pairs": pairs,
        "GFLOP of a step with a refresh": round(meter.flops / 1e9, 1),
        "GFLOP of a step on average": round(flops / 1e9, 1),
        "seconds of a step": round(meter.seconds[0], 2),
        "peak MB of a step": None if meter.peak_mb[0] is None else round(meter.peak_mb[0]),
        "peak resident MB of the process": round(peak_mb),
        "MB kept for the backward pass": round(meter.saved_bytes / 2**20),
        "seconds of train()": round(train_seconds, 1),
        "seconds of 2 images at 2 NFE": round(sample_seconds, 1),
        "configured pairs": configured_pairs,
        "TFLOP of a configured step on average": round(scale * flops / 1e12, 2),
        "estimated GB of a configured step": estimated_gb,
        "steps": configured.training.num_steps,
        "PFLOP of the configured training": round(configured.training.num_steps * scale * flops / 1e15),
    }
    for name, value in figures.items():
        record_property(name, value)
    with capsys.disabled():
        print("\n" + "\n".join(f"{name}: {value}" for name, value in figures.items()))
    assert 83e6 < num_autoencoder_parameters < 84e6 and 40e6 < meter.num_parameters < 50e6
    assert 20e9 < flops / pairs < 50e9
    assert 0 < meter.seconds[0] < 120
    assert peak_mb < 12_000 and weights_mb < 2_000
    assert 10 < meter.saved_bytes / 2**20 / pairs < 100
