"""`latent-dmmd train`: a run folder."""

from latent_dmmd.training import train
from latent_dmmd.training.config import Config, parse_config


def main(args: list[str] | None = None) -> None:
    folder = train(parse_config(Config, args))
    print(f"\nimages:   {folder / 'samples.png'}   pipeline: {folder / 'pipeline'}")
    print(f"next:     latent-dmmd sample --pipeline {folder / 'pipeline'} --num_images 64 --output_dir samples")
