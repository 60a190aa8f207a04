"""The table of a README, as Markdown: a few rows of each data set."""

from latent_dmmd.experiments.compare import MAX_TABLE_ROWS
from latent_dmmd.experiments.estimates import Estimate, estimate
from latent_dmmd.experiments.exports import budget_text
from latent_dmmd.experiments.grids import shown_nfe
from latent_dmmd.experiments.summary import excess_of, level_of

TITLES = {"elpv": "ELPV photographs", "openmoji": "OpenMoji drawings"}
ERRORS = "mean ± standard error over training seeds where there are several"


def title_of(result: dict) -> str:
    """What a comparison is called: by its data set, and by its budget where it has one."""
    settings = result["settings"]
    name = TITLES.get(settings["training"].partition(":")[0], settings["training"])
    budget = budget_text({"minutes": settings["minutes"], "num_steps": settings["steps"]})
    return f"{name}, {budget} of training" if budget else name


def table_rows(result: dict) -> list[dict]:
    """The rows of the table: those that `table` names, or at most 8 of the usual NFE, the entries compared first."""
    settings, rows = result["settings"], result["rows"]
    if settings["table"]:
        wanted = [(label, nfe) for label, numbers in settings["table"].items() for nfe in numbers]
        found = {(row["label"], row["nfe"]): row for row in rows}
        return [found[key] for key in wanted if key in found]
    named = (settings["dmmd"], settings["baseline"])
    usual = {row["label"]: shown_nfe([r["nfe"] for r in rows if r["label"] == row["label"]]) for row in rows}
    first = [row for row in rows if row["entry"] in named and row["nfe"] in usual[row["label"]]]
    last = {row["label"]: row for row in rows if row["entry"] not in named}  # of each the largest NFE
    others = sorted(last.values(), key=lambda row: estimate(row["frechet_distance"]).mean)
    return [*first, *others][:MAX_TABLE_ROWS]


def markdown_table(results: list[dict]) -> str:
    """The tables of all data sets, one below the other."""
    return "\n".join(part for result in results for part in markdown_of(result))


def markdown_of(result: dict) -> list[str]:
    """The lines of one data set."""
    settings = result["settings"]
    sizes = f"n = {settings['num_images']:,} against {settings['num_reference']:,} held out"
    header, rows = main_table(result)
    lines = [f"**{escaped(title_of(result))}**, {sizes}:", ""]
    lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(map(escaped, cells)) + " |" for cells in rows]
    return [*lines, "", main_note(result), ""]


def main_table(result: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table, as texts."""
    header = ["model", "NFE", result["settings"]["distance"], "above reconstructed", "recall", "coverage"]
    rows = []
    for row in table_rows(result):
        cells = [row["label"], str(row["nfe"] or "–"), estimate(row["frechet_distance"]).text(1)]
        cells.append(excess_of(result, row["label"], row["nfe"]).text(1))
        cells += [estimate(row[name]).text(2) for name in ("recall", "coverage")]
        rows.append([*cells, estimate(row["memorised_share"]).text(1, factor=100), milliseconds(row)])
    return [*header, "memorised %", "ms per image"], rows


def main_note(result: dict) -> str:
    """What the table is held against."""
    level = f"As many reconstructed training images score {level_of(result):.1f}"
    return f"{ERRORS[0].upper()}{ERRORS[1:]}. {level}, the floor is {result['floor_distance']:.1f}."


def escaped(text: str) -> str:
    """A name that divides no cell."""
    return text.replace("|", "\\|")


def milliseconds(row: dict) -> str:
    """Time per image, where it was measured."""
    return "–" if row["seconds_per_image"] is None else f"{1000 * row['seconds_per_image']:.0f}"


def shown(value: Estimate | None, digits: int = 2) -> str:
    """An estimate as text, or a dash."""
    return "–" if value is None else value.text(digits)


def score_lines(result: dict) -> list[str]:
    """One line of texts for each entry and NFE, to be printed."""
    scores = {
        "frechet_distance": (1, 1),
        "kid_mean": (1, 1000),
        "precision": (2, 1),
        "recall": (2, 1),
        "coverage": (2, 1),
    }
    return [
        "  ".join(
            [
                f"{row['label']:<30}{row['nfe'] or '–':>4}",
                *(estimate(row[name]).text(digits, factor) for name, (digits, factor) in scores.items()),
                f"{milliseconds(row)} ms",
            ]
        )
        for row in result["rows"]
    ]
