"""Train DMMD on pixels: accelerate launch scripts/train_pixel.py [--config FILE.yaml] [--key value …].

`train_latent.py` on top of configs/elpv256_pixel.yaml.
"""

import sys
from pathlib import Path

from train_latent import run

DEFAULTS = Path(__file__).parents[1] / "configs" / "elpv256_pixel.yaml"

if __name__ == "__main__":
    run(["--config", str(DEFAULTS), *sys.argv[1:]])
