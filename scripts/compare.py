"""`python scripts/compare.py` is `latent-dmmd compare`."""

from latent_dmmd.commands.compare import main
from latent_dmmd.utils.cli import run

if __name__ == "__main__":
    run(main)
