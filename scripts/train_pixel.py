"""Train DMMD on pixels: accelerate launch scripts/train_pixel.py [--config FILE.yaml] [--key value …].

`train_latent.py` on top of configs/elpv256_pixel.yaml.
"""

import sys
from pathlib import Path

from latent_dmmd.config import Config, parse_config
from latent_dmmd.training import train

DEFAULTS = Path(__file__).parents[1] / "configs" / "elpv256_pixel.yaml"


def main() -> None:
    folder = train(parse_config(Config, ["--config", str(DEFAULTS), *sys.argv[1:]]))
    print(f"\npictures: {folder / 'samples.png'}   pipeline: {folder / 'pipeline'}")
    print(f"next:     python scripts/sample.py --pipeline {folder / 'pipeline'} --num_images 64 --output_dir samples")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"train_pixel.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
