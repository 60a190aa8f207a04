"""`python scripts/evaluate_edits.py` is `latent-dmmd evaluate-edits`."""

from latent_dmmd.commands.evaluate_edits import main
from latent_dmmd.utils.cli import run

if __name__ == "__main__":
    run(main)
