"""`python scripts/demo.py` is `latent-dmmd demo`."""

from latent_dmmd.commands.demo import main
from latent_dmmd.utils.cli import run

if __name__ == "__main__":
    run(main)
