"""`latent-dmmd train-autoencoder`. Running the same command again resumes."""

import torch
from tqdm.auto import tqdm

from latent_dmmd.data.sources import load_images
from latent_dmmd.training.autoencoder import AutoencoderTrainingConfig, train_autoencoder
from latent_dmmd.training.config import parse_config


def main(args: list[str] | None = None) -> None:
    config = parse_config(AutoencoderTrainingConfig, args)
    source = load_images("elpv:train", resolution=256)
    images_uint8 = torch.stack([source[i] for i in tqdm(range(len(source)), desc="reading")])
    folder = train_autoencoder(images_uint8, config)
    print(f"autoencoder: {folder}")
    print(f"next:        latent-dmmd train --autoencoder.name_or_path {folder} --output_dir runs/NAME")
