"""`python scripts/evaluate_classes.py` is `latent-dmmd evaluate-classes`."""

from latent_dmmd.commands.evaluate_classes import main
from latent_dmmd.utils.cli import run

if __name__ == "__main__":
    run(main)
