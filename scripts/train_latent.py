"""Train latent DMMD: accelerate launch scripts/train_latent.py [--config FILE.yaml] [--key value …]."""

import sys
from pathlib import Path

from latent_dmmd.config import Config, parse_config
from latent_dmmd.training import train


def main(args: list[str]) -> None:
    folder = train(parse_config(Config, args))
    print(f"\npictures: {folder / 'samples.png'}   pipeline: {folder / 'pipeline'}")
    print(f"next:     python scripts/sample.py --pipeline {folder / 'pipeline'} --num_images 64 --output_dir samples")


def run(args: list[str]) -> None:
    """`main`, with bad input as one line."""
    try:
        main(args)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run(sys.argv[1:])
