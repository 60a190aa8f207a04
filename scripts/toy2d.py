"""`python scripts/toy2d.py` is `latent-dmmd toy2d`."""

from latent_dmmd.commands.toy2d import main
from latent_dmmd.utils.cli import run

if __name__ == "__main__":
    run(main)
