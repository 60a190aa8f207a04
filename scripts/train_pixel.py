"""`accelerate launch scripts/train_pixel.py` is `latent-dmmd train --config elpv256_pixel`: DMMD on pixels."""

import sys
from functools import partial

from latent_dmmd.commands.train import main
from latent_dmmd.utils.cli import run

if __name__ == "__main__":
    run(partial(main, ["--config", "elpv256_pixel", *sys.argv[1:]]))
