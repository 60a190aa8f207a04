"""`python scripts/film.py` is `latent-dmmd film`."""

from latent_dmmd.commands.film import main
from latent_dmmd.utils.cli import run

if __name__ == "__main__":
    run(main)
