"""Tiny networks and pictures that the tests share."""

import json
import os

# no test asks the network
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from PIL import Image

from latent_dmmd import FeatureNet, LatentDMMDPipeline, MeanEmbeddings
from latent_dmmd.data import DataError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


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


@pytest.fixture
def tiny_pictures(tmp_path):
    """A folder of 12 smooth random pictures, 32 × 32 pixels."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    coarse = np.random.default_rng(0).integers(0, 256, (12, 4, 4, 3), dtype=np.uint8)
    for i, pixels in enumerate(coarse):
        Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture
def arguments(tiny_vae, tiny_pictures, tmp_path):
    tiny_vae.save_pretrained(tmp_path / "vae")
    settings = {
        "data": {"name_or_path": str(tiny_pictures), "resolution": 32, "cache_dir": str(tmp_path / "cache")},
        "autoencoder": {"name_or_path": str(tmp_path / "vae")},
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
            "mixed_precision": "no",
        },
        "sampling": {"num_images": 2, "num_noise_levels": 4, "steps_per_level": 1},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return ["--config", str(path), "--output_dir", str(tmp_path / "run")]


def tiny_pipeline(tiny_vae):
    """A pipeline with random weights around the tiny autoencoder."""
    torch.manual_seed(0)
    size = 32 // 2 ** (len(tiny_vae.config.block_out_channels) - 1)
    net = FeatureNet(size, 4, 6, block_out_channels=(8,), attention_levels=(True,), layers_per_block=1, num_groups=2)
    stored = MeanEmbeddings(4, 6)
    stored.levels.copy_(torch.arange(1, 5) / 4)
    stored.displacement.copy_(stored.levels)
    stored.gradient_scale.fill_(0.1)
    stored.clean.normal_()
    stored.noisy.normal_()
    pipe = LatentDMMDPipeline(net, stored, tiny_vae, [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 0.5, 1.5])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def solid(mode, color, size=(8, 8)):
    return Image.new(mode, size, color)


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
