"""`python scripts/evaluate.py` is `latent-dmmd evaluate`."""

from latent_dmmd.commands.evaluate import main
from latent_dmmd.utils.cli import run

if __name__ == "__main__":
    run(main)
