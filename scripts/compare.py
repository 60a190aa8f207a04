"""Compare DMMD with its alternatives: python scripts/compare.py --config configs/compare_elpv256.yaml --minutes 90.

Trains or loads every entry, samples and scores them alike, and writes OUTPUT_DIR/report/index.html. The same command
goes on where a killed one was; a larger --minutes goes on training.
"""

import sys

from latent_dmmd.experiments.compare import CompareConfig, Comparison
from latent_dmmd.experiments.report import score_rows, write_report
from latent_dmmd.experiments.stages import run_comparison
from latent_dmmd.training.config import parse_config
from latent_dmmd.utils.cli import run


def main() -> None:
    comparison = Comparison(parse_config(CompareConfig))
    result = run_comparison(comparison)
    for row in score_rows(result):
        print("  ".join(row))
    print(f"report: {write_report(comparison, result, ' '.join(['python', *sys.argv]))}")


if __name__ == "__main__":
    run(main)
