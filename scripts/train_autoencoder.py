"""Train the bundled autoencoder on the ELPV photographs: python scripts/train_autoencoder.py [--output_dir DIR].

Running the same command again resumes. Needs `pip install -e ".[demo,autoencoder]"`.
"""

import torch
from tqdm.auto import tqdm

from latent_dmmd.data.sources import load_images
from latent_dmmd.training.autoencoder import AutoencoderTrainingConfig, train_autoencoder
from latent_dmmd.training.config import parse_config
from latent_dmmd.utils.cli import run


def main() -> None:
    config = parse_config(AutoencoderTrainingConfig)
    source = load_images("elpv:train", resolution=256)
    images_uint8 = torch.stack([source[i] for i in tqdm(range(len(source)), desc="reading")])
    folder = train_autoencoder(images_uint8, config)
    print(f"autoencoder: {folder}")
    print(f"next:        python scripts/train_latent.py --autoencoder.name_or_path {folder} --output_dir runs/NAME")


if __name__ == "__main__":
    run(main)
