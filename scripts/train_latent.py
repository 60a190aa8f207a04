"""Train latent DMMD: accelerate launch scripts/train_latent.py [--config FILE.yaml] [--key value …]."""

import sys

from latent_dmmd.training import train
from latent_dmmd.training.config import Config, parse_config
from latent_dmmd.utils.cli import run


def main(args: list[str] | None = None) -> None:
    folder = train(parse_config(Config, sys.argv[1:] if args is None else args))
    print(f"\nimages:   {folder / 'samples.png'}   pipeline: {folder / 'pipeline'}")
    print(f"next:     python scripts/sample.py --pipeline {folder / 'pipeline'} --num_images 64 --output_dir samples")


if __name__ == "__main__":
    run(main)
