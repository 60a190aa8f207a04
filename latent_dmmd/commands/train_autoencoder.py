"""`latent-dmmd train-autoencoder`. Running the same command again resumes."""

import shlex

from latent_dmmd.training.autoencoder import AutoencoderTrainingConfig, train_autoencoder
from latent_dmmd.training.config import parse_config


def main(args: list[str] | None = None) -> None:
    config = parse_config(AutoencoderTrainingConfig, args)
    folder = train_autoencoder(config)
    data = shlex.join(["--data.name_or_path", config.data.name_or_path, "--autoencoder.name_or_path", str(folder)])
    print(f"autoencoder: {folder}")
    print(f"next:        latent-dmmd train {data} --data.resolution {config.data.resolution} --output_dir runs/NAME")
