"""Tiny networks and images that the tests share, and the one fixture that keeps a test from leaning on its machine."""

import json
import os
import random
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

# no test asks the network
os.environ["HF_HUB_OFFLINE"] = "1"
# one worker, one thread: workers share the cores; an explicit OMP_NUM_THREADS wins
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch_fidelity
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from einops import rearrange
from PIL import Image
from torch import nn
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from latent_dmmd import FeatureNet, LatentDMMDPipeline, MeanEmbeddings
from latent_dmmd.baselines import VelocityNet
from latent_dmmd.metrics.extractors import EXTRACTORS, FeatureSpace
from latent_dmmd.training.config import Config, parse_config
from latent_dmmd.training.loop import train
from latent_dmmd.utils.errors import DataError
from latent_dmmd.utils.process import default_device, resolved_precision

ROOT = Path(__file__).parents[1]
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def hide_accelerators(markers: str, environment: dict) -> None:
    """Hide every GPU from a session and from the processes it starts, unless its `-m` asks for GPU tests."""
    if "gpu" not in markers.replace("not gpu", ""):
        environment["CUDA_VISIBLE_DEVICES"] = ""
        environment["ACCELERATE_USE_CPU"] = "true"


def pytest_configure(config):
    hide_accelerators(config.option.markexpr, os.environ)


def pytest_report_header():
    return (
        f"auto precision: {resolved_precision('auto')}, threads: {torch.get_num_threads()}, "
        f"device: {default_device()}, torch {torch.__version__}"
    )


def reset_accelerate():
    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState._reset_state()


@pytest.fixture(autouse=True)
def process_state():
    """Every test starts from the same process, whatever ran before it, and leaves it so."""
    environment, folder, threads = dict(os.environ), os.getcwd(), torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    reset_accelerate()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    yield
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    reset_accelerate()


def build_kl():
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
    )


def build_tiny():
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )


def build_dc():
    return AutoencoderDC(
        latent_channels=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        upsample_block_type="interpolate",
        downsample_block_type="Conv",
    )


BUILDERS = {"AutoencoderKL": build_kl, "AutoencoderTiny": build_tiny, "AutoencoderDC": build_dc}


def frozen(class_name, seed=0):
    torch.manual_seed(seed)
    return BUILDERS[class_name]().eval().requires_grad_(False)


@pytest.fixture
def tiny_vae():
    """A random AutoencoderKL, 3 × 32 × 32 pixels to 4 × 16 × 16 latents."""
    return frozen("AutoencoderKL")


@pytest.fixture(params=list(BUILDERS))
def each_vae(request):
    """A random autoencoder of each class, 3 × 32 × 32 pixels to 4 × 16 × 16 latents."""
    return frozen(request.param)


def save_tiny_images(folder):
    """A folder of 12 smooth random images, 32 × 32 pixels."""
    folder.mkdir()
    coarse = np.random.default_rng(0).integers(0, 256, (12, 4, 4, 3), dtype=np.uint8)
    for i, pixels in enumerate(coarse):
        Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{i:02d}.png")
    return folder


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


# what a caller may have set around a call that trains
CALLERS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no autocast": lambda: torch.autocast("cpu", enabled=False),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "float64": lambda: default_dtype(torch.float64),
}


@pytest.fixture
def tiny_images(tmp_path):
    """A folder of images that a test may change."""
    return save_tiny_images(tmp_path / "images")


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    """Images, an autoencoder and encoded latents that tests share and do not change, and the tiny run's settings."""
    folder = tmp_path_factory.mktemp("workshop")
    frozen("AutoencoderKL").save_pretrained(folder / "vae")
    images = save_tiny_images(folder / "images")
    settings = {
        "data": {"name_or_path": str(images), "resolution": 32, "cache_dir": str(folder / "cache")},
        "autoencoder": {"name_or_path": str(folder / "vae")},
        "feature_net": {
            "num_features": 8,
            "patch_size": 1,
            "block_out_channels": [8],
            "layers_per_block": 1,
            "attention_levels": [True],
        },
        "objective": {"num_noise_levels": 4},
        "training": {
            "num_steps": 6,
            "levels_per_step": 2,
            "pairs_per_level": 4,
            "checkpointing_steps": 3,
            "log_every": 1,
        },
        "sampling": {"num_images": 2, "num_noise_levels": 4, "steps_per_level": 1},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    del settings["objective"]
    (folder / "plain.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture
def arguments(workshop, tmp_path):
    """The command line of the tiny run, whose folder is the test's own; its precision is "auto"."""
    return ["--config", str(workshop / "tiny.yaml"), "--output_dir", str(tmp_path / "run")]


@pytest.fixture
def plain_arguments(workshop, tmp_path):
    """`arguments` without keys of the objective, for methods that have no noise levels."""
    return ["--config", str(workshop / "plain.yaml"), "--output_dir", str(tmp_path / "run")]


@pytest.fixture(scope="session")
def trained_once(workshop):
    return train(parse_config(Config, ["--config", str(workshop / "tiny.yaml"), "--output_dir", str(workshop / "run")]))


@pytest.fixture
def trained(trained_once, tmp_path):
    """The finished tiny run in the folder that `arguments` names, copied: a test may damage it."""
    return Path(shutil.copytree(trained_once, tmp_path / "run"))


TINY_NET = dict(patch_size=1, block_out_channels=(8,), attention_levels=(True,), layers_per_block=1, num_groups=2)


def tiny_features(size=4, channels=2, num_features=6, architecture=FeatureNet, **options):
    """A random φ; the seed is the caller's."""
    return architecture(size, channels, num_features, **{**TINY_NET, **options})


def tiny_velocity(size=4, channels=2, **options):
    """A random velocity network of the same sizes."""
    return VelocityNet(size, channels, **{**TINY_NET, **options})


def moved(net):
    """The network away from its initialisation, at which some outputs are zero."""
    torch.manual_seed(0)
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net


def random_embeddings(num_levels=4, num_features=6, **options):
    """Stored mean embeddings of random values at evenly spaced levels, with a gradient scale of 0.1."""
    stored = MeanEmbeddings(num_levels, num_features, **options)
    stored.levels.copy_(torch.arange(1, num_levels + 1) / num_levels)
    stored.gradient_scale.fill_(0.1)
    stored.clean.normal_()
    stored.noisy.normal_()
    return stored


def tiny_pipeline(tiny_vae):
    """A pipeline with random weights around the tiny autoencoder."""
    torch.manual_seed(0)
    size = 32 // 2 ** (len(tiny_vae.config.block_out_channels) - 1)
    sampling = dict(sampler="approximate", num_noise_levels=4, steps_per_level=2)
    net, stored = tiny_features(size, 4), random_embeddings()
    pipe = LatentDMMDPipeline(net, stored, tiny_vae, [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 0.5, 1.5], sampling=sampling)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def solid(mode, color, size=(8, 8)):
    return Image.new(mode, size, color)


def assert_color(decoded, color, tolerance=0):
    """An image as uint8 of shape (3, H, W) is of one colour."""
    assert decoded.dtype == torch.uint8
    assert (decoded - torch.tensor(color).view(3, 1, 1)).abs().max() <= tolerance


def refusal(function, *args, **options):
    """The message of the DataError, which is one line."""
    with pytest.raises(DataError) as caught:
        function(*args, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def weights(folder):
    """The features' weights in the pipeline of a run folder."""
    return LatentDMMDPipeline.from_pretrained(folder / "pipeline").feature_net.state_dict()


def metrics(folder):
    """The lines of a run's metrics, without their times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


class ToyExtractor(torch_fidelity.FeatureExtractorBase):
    """8 features and 5 logits of the image at 4 × 4 pixels, by a fixed random layer."""

    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(48, 8, generator=generator) / 48**0.5)

    def forward(self, images_uint8):
        x = F.adaptive_avg_pool2d(images_uint8.float() / 64, 4)
        features = (rearrange(x, "b c h w -> b (c h w)") @ self.weight).tanh()
        provided = {"features": features, "logits": 4 * features[:, :5]}
        return tuple(provided[layer] for layer in self.features_list)

    @staticmethod
    def get_provided_features_list():
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "logits" if metric == "isc" else "features"


if "toy" not in FEATURE_EXTRACTORS_REGISTRY:
    torch_fidelity.register_feature_extractor("toy", ToyExtractor)


@pytest.fixture
def toy(monkeypatch):
    """The name of the toy extractor, known to the protocol for the length of a test."""
    monkeypatch.setitem(EXTRACTORS, "toy", FeatureSpace("toy", "features", "logits", "fd_toy"))
    return "toy"
