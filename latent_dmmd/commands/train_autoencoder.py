"""`latent-dmmd train-autoencoder`. Running the same command again resumes."""

import shlex

from latent_dmmd.training.autoencoder import AutoencoderTrainingConfig, train_autoencoder
from latent_dmmd.training.config import parse_config
from latent_dmmd.training.first_look import shared_words


def main(args: list[str] | None = None) -> None:
    config = parse_config(AutoencoderTrainingConfig, args)
    folder = train_autoencoder(config)
    words = [*shared_words(vars(config.data)), "--autoencoder.name_or_path", str(folder), "--output_dir", "runs/NAME"]
    print(f"autoencoder: {folder}")
    print(f"next:        latent-dmmd train {shlex.join(words)}")
