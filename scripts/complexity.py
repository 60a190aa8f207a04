"""`python scripts/complexity.py` is `latent-dmmd complexity`."""

from latent_dmmd.commands.complexity import main
from latent_dmmd.utils.cli import run

if __name__ == "__main__":
    run(main)
