"""The page of a comparison: `index.html`, self-contained, beside `results.json`, the plots and a Markdown table.

It is made of results and of the images in export folders alone, and shows several data sets where `beside` names them.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from latent_dmmd.experiments.compare import Comparison
from latent_dmmd.experiments.report_page import DataSet, page
from latent_dmmd.experiments.report_plots import plot_results
from latent_dmmd.experiments.report_table import markdown_table, title_of
from latent_dmmd.utils.files import write_aside, write_json

RESULTS = "comparison.json"  # in an export folder: what another comparison shows beside its own


def write_report(comparison: Comparison, result: dict, command: str) -> Path:
    """Write the report of a finished comparison; other files in its folder stay.

    Args:
        comparison: Whose images are shown.
        result: Its results.
        command: The command line that makes it, shown on the page.

    Returns:
        The page.
    """
    folder = comparison.report_dir
    write_json(comparison.export_dir / RESULTS, result)
    results = [(result, comparison.export_dir), *read_beside(comparison)]
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as aside:
        data_sets = []
        for i, (each, export_dir) in enumerate(results):
            plots = plot_results(each, Path(aside), prefix=f"{i + 1}-" if i else "")
            data_sets.append(DataSet(title_of(each), each, plots, export_dir))
        text = page(data_sets, command)
        for path in sorted(Path(aside).iterdir()):
            write_aside(folder / path.name, lambda target, path=path: target.write_bytes(path.read_bytes()))
    others = {"beside": [each for each, _ in results[1:]]} if len(results) > 1 else {}
    write_json(folder / "results.json", {"command": command, **result, **others})
    table = markdown_table([each for each, _ in results])
    write_aside(folder / "table.md", lambda aside: aside.write_text(table, encoding="utf-8"))
    write_aside(folder / "index.html", lambda aside: aside.write_text(text, encoding="utf-8"))
    return folder / "index.html"


def read_beside(comparison: Comparison) -> list[tuple[dict, Path]]:
    """Results and export folders of the other comparisons that are shown; says which are not finished."""
    found = []
    for folder in map(Path, comparison.config.beside):
        try:
            found.append((json.loads((folder / RESULTS).read_text()), folder))
        except (OSError, ValueError):
            print(f"{folder}: no finished comparison, left out")
    return found
