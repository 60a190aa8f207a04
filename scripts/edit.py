"""`python scripts/edit.py` is `latent-dmmd edit`."""

from latent_dmmd.commands.edit import main
from latent_dmmd.utils.cli import run

if __name__ == "__main__":
    run(main)
