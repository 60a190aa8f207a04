"""`accelerate launch scripts/train_latent.py` is `latent-dmmd train`."""

from latent_dmmd.commands.train import main
from latent_dmmd.utils.cli import run

if __name__ == "__main__":
    run(main)
