"""`python scripts/train_autoencoder.py` is `latent-dmmd train-autoencoder`."""

from latent_dmmd.commands.train_autoencoder import main
from latent_dmmd.utils.cli import run

if __name__ == "__main__":
    run(main)
