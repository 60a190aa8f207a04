"""Train DMMD on pixels: accelerate launch scripts/train_pixel.py [--config FILE.yaml] [--key value …].

`train_latent.py` on top of configs/elpv256_pixel.yaml.
"""

import sys
from functools import partial
from pathlib import Path

from train_latent import main

from latent_dmmd.utils.cli import run

DEFAULTS = Path(__file__).parents[1] / "configs" / "elpv256_pixel.yaml"

if __name__ == "__main__":
    run(partial(main, ["--config", str(DEFAULTS), *sys.argv[1:]]))
