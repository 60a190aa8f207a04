"""`python scripts/diagnose.py` is `latent-dmmd diagnose`."""

from latent_dmmd.commands.diagnose import main
from latent_dmmd.utils.cli import run

if __name__ == "__main__":
    run(main)
