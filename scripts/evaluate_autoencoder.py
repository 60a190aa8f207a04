"""`python scripts/evaluate_autoencoder.py` is `latent-dmmd evaluate-autoencoder`."""

from latent_dmmd.commands.evaluate_autoencoder import main
from latent_dmmd.utils.cli import run

if __name__ == "__main__":
    run(main)
