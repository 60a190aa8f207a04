"""`latent-dmmd compare`: train or load every entry, sample and score them alike, write OUTPUT_DIR/report/index.html.

The same command goes on where a killed one was; a larger --minutes goes on training.
"""

from latent_dmmd.experiments.compare import CompareConfig, Comparison
from latent_dmmd.experiments.report import score_rows, write_report
from latent_dmmd.experiments.stages import run_comparison
from latent_dmmd.training.config import parse_config
from latent_dmmd.utils.cli import command_line
from latent_dmmd.utils.files import check_folder


def main(args: list[str] | None = None) -> None:
    comparison = Comparison(parse_config(CompareConfig, args))
    check_folder(comparison.folder / "report")
    result = run_comparison(comparison)
    for row in score_rows(result):
        print("  ".join(row))
    print(f"report: {write_report(comparison, result, command_line())}")
