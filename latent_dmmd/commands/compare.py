"""`latent-dmmd compare`: train or load every entry, sample and score them alike, write the page.

The same command goes on where a killed one was, also on another machine that has the export folder; a larger --minutes
goes on training. --rebuild makes the page of finished runs alone.
"""

from latent_dmmd.experiments.compare import CompareConfig, Comparison
from latent_dmmd.experiments.report import write_report
from latent_dmmd.experiments.report_table import score_lines
from latent_dmmd.experiments.stages import run_comparison
from latent_dmmd.training.config import parse_config
from latent_dmmd.utils.cli import command_line
from latent_dmmd.utils.files import check_folder


def main(args: list[str] | None = None) -> None:
    comparison = Comparison(parse_config(CompareConfig, args))
    runs = [] if comparison.config.rebuild else [comparison.folder]
    for folder in (*runs, comparison.report_dir, comparison.export_dir):
        check_folder(folder)
    result = run_comparison(comparison)
    if result is None:
        print(f"finished, in {comparison.export_dir}: {', '.join(comparison.config.only) or 'seconds per step'}")
        return
    print("\n".join(score_lines(result)))
    print(f"report: {write_report(comparison, result, command_line())}")
