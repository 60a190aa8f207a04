"""`python scripts/sample.py` is `latent-dmmd sample`."""

from latent_dmmd.commands.sample import main
from latent_dmmd.utils.cli import run

if __name__ == "__main__":
    run(main)
