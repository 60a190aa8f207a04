"""Train the bundled autoencoder on the ELPV photographs: python scripts/train_autoencoder.py [--output_dir DIR].

Running the same command again resumes. Needs `pip install -e ".[demo,autoencoder]"`.
"""

import sys

import torch
from tqdm.auto import tqdm

from latent_dmmd.autoencoder import AutoencoderTrainingConfig, train_autoencoder
from latent_dmmd.config import parse_config
from latent_dmmd.data import load_pictures


def main() -> None:
    config = parse_config(AutoencoderTrainingConfig)
    pictures = load_pictures("elpv:train", resolution=256)
    images_uint8 = torch.stack([pictures[i] for i in tqdm(range(len(pictures)), desc="reading")])
    folder = train_autoencoder(images_uint8, config)
    print(f"autoencoder: {folder}")
    print(f"next:        python scripts/train_latent.py --autoencoder.name_or_path {folder} --output_dir runs/NAME")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, ImportError, OSError, FloatingPointError) as error:
        print(f"train_autoencoder.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
