"""Tiny networks and pictures that the tests share."""

import os

# no test asks the network
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from PIL import Image


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
