"""The HTML of a report. Everything that is not ours, names included, is escaped."""

import base64
import html
from pathlib import Path
from typing import NamedTuple

from latent_dmmd.experiments.compare import GAUSSIAN
from latent_dmmd.experiments.estimates import Estimate, estimate
from latent_dmmd.experiments.report_table import ERRORS, main_note, main_table, milliseconds, shown
from latent_dmmd.experiments.summary import equal_time_ratio, excess_of, excess_ratio
from latent_dmmd.metrics.evaluation import SMALL_BELOW

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.35rem; margin-top: 3rem; border-bottom: 1px solid #d8dee4; }
h3 { font-size: 1.1rem; margin-top: 2rem; }
figure { margin: 0; } figcaption, .note { color: #57606a; font-size: .9rem; overflow-wrap: anywhere; }
.figures { display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
.plots { grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }
img { width: 100%; height: auto; display: block; }
.zoom { position: relative; display: block; cursor: zoom-in; }
.zoom input { position: absolute; opacity: 0; }
.zoom input:focus-visible + span { display: block; outline: 3px solid #0969da; }
.zoom input:checked + span { position: fixed; inset: 0; z-index: 1; overflow: auto; background: #fff; }
.zoom input:checked + span { cursor: zoom-out; }
.zoom input:checked + span img { width: auto; max-width: none; margin: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #d8dee4; text-align: right; white-space: nowrap; }
th { vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
.texts th:first-child, .texts td:first-child { white-space: normal; min-width: 10rem; }
summary { cursor: pointer; padding: .3rem 0; }
pre { background: #f6f8fa; padding: .7rem; overflow-x: auto; font-size: .85rem; }
"""


class DataSet(NamedTuple):
    """What the page shows of one data set.

    Attributes:
        title: What it is called.
        result: The results.
        plots: Files and captions.
        folder: The export folder, where the images are.
    """

    title: str
    result: dict
    plots: list[tuple[Path, str]]
    folder: Path


def page(data_sets: list[DataSet], command: str) -> str:
    """The page's HTML."""
    sections = "\n".join(section(data_set) for data_set in data_sets)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Latent DMMD: the comparison</title>
<style>{STYLE}</style>
</head>
<body>
<h1>Latent DMMD and its alternatives</h1>
<pre>{html.escape(command)}</pre>
{sections}
</body>
</html>
"""


def section(data_set: DataSet) -> str:
    """One data set."""
    result, settings = data_set.result, data_set.result["settings"]
    parts = [f"<h2>{html.escape(data_set.title)}</h2>", introduction(result)]
    parts += [table(*main_table(result)), f'<p class="note">{html.escape(main_note(result))}</p>']
    rows = [[text, Estimate(**value).text(2)] for text, value in result["ratios"].items()]
    parts += ["<h3>Ratios</h3>", folded("All ratios", table(["ratio", "value"], rows, "texts"), is_open=True)]
    parts += ["<h3>Curves</h3>", figures([figure(path, caption) for path, caption in data_set.plots], "plots")]
    parts += ["<h3>Images</h3>", '<p class="note">The first images of the first seed; a click shows the full size.</p>']
    parts.append(figures(images_of(data_set, "grid")))
    if nearest := images_of(data_set, "nearest"):
        note = "Of the first 32 images, those nearest to a training image, and that image."
        parts += ["<h3>Nearest training images</h3>", f'<p class="note">{note}</p>', figures(nearest)]
    parts += ["<h3>All scores</h3>", folded("Distances", distance_table(result), distance_note(settings))]
    parts.append(folded("Precision, recall and coverage", coverage_table(result)))
    parts.append(
        '<p class="note">Memorised: nearer, in the features\' Euclidean distance, to a training image than 99 % of the '
        f"held-out images are. The entry {GAUSSIAN} is a Gaussian fitted to the training latents.</p>"
    )
    parts += ["<h3>What no entry can beat</h3>", context_table(result)]
    parts += ["<h3>What it cost</h3>", cost_tables(result)]
    return "\n".join(parts)


def introduction(result: dict) -> str:
    """How entries were trained, sampled and scored."""
    settings = result["settings"]
    budget = (
        f"{settings['minutes']:g} minutes of training for each run"
        if settings["minutes"]
        else f"{settings['steps']} training steps of each run"
        if settings["steps"]
        else "Finished runs"
    )
    loaded = ", ".join(f"{name} ({folder})" for name, folder in settings["trained"].items())
    budget += f", but for those loaded: {loaded}" if loaded else ""
    extractors = " and ".join(filter(None, (settings["extractor"], settings["second_extractor"])))
    machines = "; ".join(machine_text(machine) for machine in result["machines"])
    seeds = len(settings["seeds"])
    sampled = f"{seeds} sampling seeds, which are averaged" if seeds > 1 else "one sampling seed"
    small = " Fréchet distances of so few images are biased upwards." if settings["num_images"] < SMALL_BELOW else ""
    return f"""<p>{html.escape(budget)}, on <code>{html.escape(settings["training"])}</code>;
{settings["num_images"]} generated images a set, {settings["batch_size"]} at most at once, against
{settings["num_reference"]} of <code>{html.escape(settings["reference"])}</code>; features of
{html.escape(extractors)}; {sampled}; {ERRORS};
{html.escape(machines)}.{small}</p>"""


def machine_text(machine: dict) -> str:
    """A machine in words."""
    threads = f"{machine['threads']} CPU thread{'s' * (machine['threads'] != 1)}"
    return f"{machine['gpu'] or threads}, torch {machine['torch']}"


def distance_table(result: dict) -> str:
    """Distances to held-out images, above reconstructed training images, to reconstructions and to training images."""
    settings = result["settings"]
    header = ["entry", "NFE", settings["distance"], "above reconstructed", f"÷ {settings['baseline']}'s"]
    header += ["at equal time", "to reconstructed held-out", "to training", "KID ×10³"]
    if settings["second_extractor"]:
        header += [settings["second_distance"], f"its excess ÷ {settings['baseline']}'s"]
    rows = []
    for row in result["rows"]:
        cells = [row["label"], str(row["nfe"] or "–"), estimate(row["frechet_distance"]).text(1)]
        cells.append(excess_of(result, row["label"], row["nfe"]).text(1))
        cells += [shown(excess_ratio(result, row)), shown(equal_time_ratio(result, row))]
        cells += [estimate(row[name]).text(1) for name in ("reconstructed_distance", "training_distance")]
        cells.append(estimate(row["kid_mean"]).text(1, factor=1000))
        if settings["second_extractor"]:
            cells += [estimate(row["second"]["frechet_distance"]).text(1), shown(excess_ratio(result, row, "second"))]
        rows.append(cells)
    return table(header, rows)


def distance_note(settings: dict) -> str:
    """What the columns are."""
    return (
        '<p class="note">Above reconstructed: the distance minus that of as many reconstructed training images. '
        f"÷ {html.escape(settings['baseline'])}'s: the ratio of these excesses at the same NFE, and at equal seconds "
        "per image, between its NFE. To training: the mean over two disjoint halves of as many training images.</p>"
    )


def coverage_table(result: dict) -> str:
    """Precision, recall and coverage, memorised images and time."""
    second = bool(result["settings"]["second_extractor"])
    header = ["entry", "NFE", "precision", "recall", "density", "coverage"]
    header += [f"{name}, second" for name in ("precision", "recall", "coverage")] if second else []
    header += ["coverage of training", "memorised %", "ms per image"]
    rows = []
    for row in result["rows"]:
        cells = [row["label"], str(row["nfe"] or "–")]
        cells += [estimate(row[name]).text(2) for name in ("precision", "recall", "density", "coverage")]
        if second:
            cells += [estimate(row["second"][name]).text(2) for name in ("precision", "recall", "coverage")]
        cells += [estimate(row["training_coverage"]).text(2), estimate(row["memorised_share"]).text(1, factor=100)]
        rows.append([*cells, milliseconds(row)])
    return table(header, rows)


def context_table(result: dict) -> str:
    """Scores of real and reconstructed images, by each network."""
    header = [
        "set",
        "features",
        "distance",
        "to reconstructed held-out",
        "to training",
        "precision",
        "recall",
        "coverage",
    ]
    rows = []
    for extractor, context in result["context"].items():
        n = context["num_each"]
        for name, text in (
            ("real_training", "training images"),
            ("reconstructed_training", "reconstructed training images"),
        ):
            scores = context[name]
            cells = [f"{text}, n = {n}, mean of two halves", extractor, f"{scores['frechet_distance']:.1f}"]
            cells += [f"{scores[key]:.1f}" for key in ("reconstructed_distance", "training_distance")]
            rows.append(cells + [f"{scores[key]:.2f}" for key in ("precision", "recall", "coverage")])
        for name, text in (
            ("floor_distance", "training against training images, the floor"),
            ("reconstruction_distance", "reconstructed held-out images"),
        ):
            rows.append([text, extractor, f"{context[name]:.1f}"] + ["–"] * 5)
    return table(header, rows, "texts")


def cost_tables(result: dict) -> str:
    """Training and sampling costs."""
    # what comparisons recorded before as the peak was at least that of the process that waited
    measured = any(entry.get("resident_mb") for entry in result["entries"].values())
    memory = "Peak MB is the resident memory of the process that trained, or what a GPU allocated. " if measured else ""
    rows = [
        [
            name,
            f"{entry['num_parameters'] / 1e6:.2f}",
            str(entry["num_steps"]),
            f"{entry['seconds_per_step']:.3f}",
            f"{entry['training_minutes']:.1f}",
            *([f"{entry['resident_mb']:.0f}" if entry.get("resident_mb") else "–"] if measured else []),
        ]
        for name, entry in result["entries"].items()
    ]
    speed = [[name, f"{1000 * cost['seconds']:.2f}"] for name, cost in result["speed"].items()]
    return "\n".join(
        [
            table(
                ["entry", "million parameters", "steps", "s per step", "training minutes", *["peak MB"] * measured],
                rows,
            ),
            '<p class="note">Training minutes are steps times seconds per step, measured in turns on an idle machine. '
            f"{memory}An entry with a teacher has its time besides.</p>",
            table(["one NFE (decode: all) of one image", "ms"], speed),
            '<p class="note">Measured in turns, medians of 7, in batches of 32, without decoding.</p>',
        ]
    )


def images_of(data_set: DataSet, kind: str) -> list[str]:
    """The figures of grids that finished runs left."""
    found = []
    for image in data_set.result["images"]:
        if image["kind"] == kind:
            nfe = f", {image['nfe']} NFE" if image["nfe"] else ""
            found.append(figure(data_set.folder / image["file"], f"{image['label']}{nfe}"))
    return found


def folded(title: str, *parts: str, is_open: bool = False) -> str:
    """Parts that a click on the title shows or hides."""
    return f"<details{' open' if is_open else ''}><summary>{html.escape(title)}</summary>{''.join(parts)}</details>"


def figures(items: list[str], extra: str = "") -> str:
    """Figures side by side where there is room."""
    return f'<div class="figures {extra}">{"".join(items)}</div>'


def figure(path: Path, caption: str) -> str:
    """An image inside the page, at full size on a click, without a script."""
    text, kind = html.escape(caption), path.suffix[1:]
    data = base64.b64encode(path.read_bytes()).decode()
    img = f'<img src="data:image/{kind};base64,{data}" alt="{text}">'
    zoom = f'<label class="zoom"><input type="checkbox" aria-label="full size: {text}"><span>{img}</span></label>'
    return f"<figure>{zoom}<figcaption>{text}</figcaption></figure>"


def table(header: list[str], rows: list[list[str]], extra: str = "") -> str:
    """A table of texts, which are escaped; with `extra` "texts" those of the first column take several lines."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide {extra}"><table><tr>{head}</tr>{body}</table></div>'
