"""Train latent DMMD: accelerate launch scripts/train_latent.py [--config FILE.yaml] [--key value …]."""

import sys

from latent_dmmd.config import Config, parse_config
from latent_dmmd.training import train


def main() -> None:
    folder = train(parse_config(Config))
    print(f"\npictures: {folder / 'samples.png'}   pipeline: {folder / 'pipeline'}")
    print(f"next:     python scripts/sample.py --pipeline {folder / 'pipeline'} --num_images 64 --output_dir samples")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"train_latent.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
