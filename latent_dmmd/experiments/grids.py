"""Grids of images that a finished run leaves, at the images' own size."""

from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

from latent_dmmd.metrics.scores import nearest
from latent_dmmd.utils.images import labelled_grid, to_pil

SHOWN_NFE = (10, 100)
NUM_COLUMNS = 4
NUM_IMAGES = 8


def shown_nfe(numbers: list[int]) -> list[int]:
    """The NFE whose images are shown: the usual ones, or the largest of all that an entry has."""
    return sorted({nfe for nfe in numbers if nfe in SHOWN_NFE} or {max(numbers)})


def image_grid(images_uint8: Tensor) -> Image.Image:
    """The first images of (N, 3, R, R), at most 8, in rows of 4."""
    images = images_uint8[:NUM_IMAGES]
    blank = images.new_full((-len(images) % NUM_COLUMNS, *images.shape[1:]), 255)
    return to_pil(
        rearrange(torch.cat([images, blank]), "(row column) c h w -> c (row h) (column w)", column=NUM_COLUMNS)
    )


def nearest_grid(path: Path, training_features: Tensor, training: Dataset) -> Image.Image:
    """Of the first images of a set, those nearest to a training image, above that image.

    Args:
        path: The set's file, of `features_0` and `images`.
        training_features: Features of the training images, with shape (M, d).
        training: The training images.
    """
    tensors = load_file(path)
    images = tensors["images"]
    distances, index = nearest(tensors["features_0"][: len(images)], training_features)
    chosen = distances.argsort()[:NUM_COLUMNS]
    near = torch.stack([training[i] for i in index[chosen].tolist()])
    return labelled_grid({"generated": images[chosen], "nearest training image": near}, NUM_COLUMNS)
