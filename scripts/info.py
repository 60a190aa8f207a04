"""`python scripts/info.py` is `latent-dmmd info`."""

from latent_dmmd.commands.info import main
from latent_dmmd.utils.cli import run

if __name__ == "__main__":
    run(main)
