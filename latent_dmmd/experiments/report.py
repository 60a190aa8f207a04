"""The page of a comparison: `index.html`, self-contained, beside `results.json` and the plots as PNG."""

import base64
import html
import io
import statistics
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from latent_dmmd.experiments.compare import GAUSSIAN, Comparison
from latent_dmmd.experiments.stages import NUM_SHOWN, real_features
from latent_dmmd.experiments.summary import mean_of
from latent_dmmd.metrics.evaluation import SMALL_BELOW
from latent_dmmd.metrics.scores import nearest
from latent_dmmd.utils.files import write_aside, write_json
from latent_dmmd.utils.images import labelled_grid

SHOWN_NFE = (10, 100)
NUM_COLUMNS = 8
STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 68rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
figure { margin: 1rem 0; } figcaption, .note { color: #57606a; font-size: .9rem; }
img { width: 100%; min-width: 42rem; height: auto; display: block; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #d8dee4; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 10rem; }
pre { background: #f6f8fa; padding: .7rem; overflow-x: auto; font-size: .85rem; }
"""


def write_report(comparison: Comparison, result: dict, command: str) -> Path:
    """Write the report of a finished comparison, aside and renamed.

    Args:
        comparison: Whose images are shown.
        result: Its results.
        command: The command line that makes it, shown on the page.

    Returns:
        The page.
    """
    result = {"command": command, **result}
    folder, named = comparison.folder / "report", (result["settings"]["dmmd"], result["settings"]["baseline"])
    files = comparison.set_files({name: entry["num_steps"] for name, entry in result["entries"].items()})
    sets = {(label, nfe): load_file(files[label][nfe, comparison.config.seeds[0]]) for label, nfe in shown_rows(result)}
    held_out = comparison.load_images(comparison.config.reference).examples(NUM_COLUMNS, seed=0)
    grids = [("held-out photographs", 0, held_out)]
    grids += [(label, nfe, tensors["images"][:NUM_COLUMNS]) for (label, nfe), tensors in sets.items()]
    near = [
        (label, nfe, neighbours(comparison, tensors, NUM_COLUMNS))
        for (label, nfe), tensors in sets.items()
        if nfe == max(SHOWN_NFE) and label.startswith(named)
    ]

    def write(aside: Path) -> None:
        aside.mkdir(parents=True)
        write_json(aside / "results.json", result)
        plots = plot_distances(result, aside)
        (aside / "index.html").write_text(page(result, plots, grids, near), encoding="utf-8")

    write_aside(folder, write)
    return folder / "index.html"


def neighbours(comparison: Comparison, tensors: dict[str, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Of the first images of a set, those nearest to a training image, and that image."""
    distances, index = nearest(tensors["features"][: len(tensors["images"])], real_features(comparison)["training"])
    chosen, training = distances.argsort()[:count], comparison.load_images(comparison.training_data)
    return tensors["images"][chosen], torch.stack([training[i] for i in index[chosen].tolist()])


def shown_rows(result: dict) -> list[tuple[str, int]]:
    """Label and NFE of the sets whose images are shown: the usual NFE, or all that an entry has."""
    rows = []
    for label in dict.fromkeys(row["label"] for row in result["rows"]):
        numbers = [row["nfe"] for row in result["rows"] if row["label"] == label]
        rows += [(label, nfe) for nfe in ([n for n in numbers if n in SHOWN_NFE] or numbers[-1:])]
    return rows


def plot_distances(result: dict, folder: Path) -> list[tuple[Path, str]]:
    """The curves: Fréchet distance and KID over NFE, and the Fréchet distance over time per image."""
    from matplotlib.figure import Figure  # not pyplot, whose backend is the caller's
    from matplotlib.ticker import ScalarFormatter

    settings, n = result["settings"], result["settings"]["num_images"]
    lines = {
        "real against real": result["floor_distance"],
        "reconstructed training images": result["reconstructed_training_distance"],
        "reconstruction": result["reconstruction_distance"],
    }
    what = f"n = {n} generated, {settings['num_reference']} held out; bars: {len(settings['seeds'])} sampling seeds"

    def curves(axis, name: str, x_of) -> None:
        labels = [label for label in dict.fromkeys(row["label"] for row in result["rows"])]
        for i, label in enumerate(labels):
            rows = [row for row in result["rows"] if row["label"] == label and row["nfe"] > 0]
            x = [x_of(row) for row in rows]
            y = [statistics.fmean(row[name]) for row in rows]
            below = [a - min(row[name]) for a, row in zip(y, rows)]
            above = [max(row[name]) - a for a, row in zip(y, rows)]
            if rows:
                axis.errorbar(x, y, (below, above), marker="o", markersize=4, capsize=3, color=f"C{i}", label=label)
            else:
                level = mean_of(result, label, 0, name)
                axis.axhline(level, color=f"C{i}", linestyle="-.", linewidth=1, label=label)
        axis.set_xscale("log")
        axis.grid(alpha=0.3, which="both")

    plots = []
    for file, name, title, x_label, x_of in (
        ("distance_nfe.png", "frechet_distance", settings["distance"], "NFE", lambda row: row["nfe"]),
        ("kid_nfe.png", "kid_mean", "KID", "NFE", lambda row: row["nfe"]),
        (
            "distance_time.png",
            "frechet_distance",
            settings["distance"],
            "seconds per image, decoding included",
            lambda row: row["seconds_per_image"],
        ),
    ):
        figure = Figure(figsize=(8, 5))
        axis = figure.subplots()
        curves(axis, name, x_of)
        if name == "frechet_distance":
            for (label, value), style in zip(lines.items(), (":", "--", "-")):
                axis.axhline(value, color="grey", linestyle=style, linewidth=1, label=label)
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(ScalarFormatter())
            axis.yaxis.set_minor_formatter(ScalarFormatter())
        axis.set_xlabel(x_label)
        axis.set_ylabel(f"{title} (lower is better)")
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        figure.savefig(folder / file, dpi=110, bbox_inches="tight")
        plots.append((folder / file, f"{title} over {x_label}; {what}"))
    return plots


def inlined(image: Image.Image | Path) -> str:
    """A image as a data URI: plots as they are, photographs as WebP."""
    if isinstance(image, Path):
        return "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80, method=6)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def figure(image: Image.Image | Path, caption: str) -> str:
    text = html.escape(caption)
    img = f'<div class="wide"><img src="{inlined(image)}" alt="{text}"></div>'
    return f"<figure>{img}<figcaption>{text}</figcaption></figure>"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table of texts, which are escaped."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def interval(values: list[float], digits: int = 1) -> str:
    """Mean (least–greatest) over seeds."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def score_rows(result: dict) -> list[list[str]]:
    """One line of texts for each entry and NFE."""
    return [
        [
            row["label"],
            str(row["nfe"] or "–"),
            interval(row["frechet_distance"]),
            interval([1000 * value for value in row["kid_mean"]]),
            interval(row["precision"], 2),
            interval(row["recall"], 2),
            interval([100 * value for value in row["memorised_share"]]),
            f"{1000 * row['seconds_per_image']:.0f}",
        ]
        for row in result["rows"]
    ]


def page(
    result: dict,
    plots: list[tuple[Path, str]],
    grids: list[tuple[str, int, Tensor]],
    neighbours: list[tuple[str, int, tuple[Tensor, Tensor]]],
) -> str:
    """The page's HTML. Everything that is not ours, names included, is escaped."""
    settings, computer = result["settings"], result["machine"]
    where = computer["gpu"] or f"{computer['threads']} CPU threads"
    budget = (
        f"{settings['minutes']:g} minutes of training for each entry"
        if settings["minutes"]
        else f"{settings['steps']} training steps of each entry"
    )
    loaded = ", ".join(f"{name} ({folder})" for name, folder in settings["trained"].items())
    budget += f", but for those loaded: {loaded}" if loaded else ""
    distance = settings["distance"]
    ratio_rows = [[text, f"{value:.2f}"] for text, value in result["ratios"].items()]
    entries = [
        [
            name,
            f"{entry['num_parameters'] / 1e6:.2f}",
            str(entry["num_steps"]),
            f"{entry['seconds_per_step']:.3f}",
            f"{entry['training_minutes']:.1f}",
            f"{entry['peak_mb']:.0f}",
        ]
        for name, entry in result["entries"].items()
    ]
    speed = [[name, f"{1000 * cost['seconds']:.2f}"] for name, cost in result["speed"].items()]
    lines = [
        ["real against real (the floor)", f"{result['floor_distance']:.1f}"],
        ["reconstructed training images (perfect latents)", f"{result['reconstructed_training_distance']:.1f}"],
        ["reconstruction of the held-out images", f"{result['reconstruction_distance']:.1f}"],
    ]
    shown = "".join(
        figure(
            labelled_grid({f"{label}" + (f", {nfe} NFE" if nfe else ""): images}, NUM_COLUMNS, side=160),
            f"{label}" + (f", {nfe} NFE" if nfe else "") + f", seed {settings['seeds'][0]}, the first {len(images)}",
        )
        for label, nfe, images in grids
    )
    near = "".join(
        figure(
            labelled_grid({"generated": generated, "nearest training image": training}, NUM_COLUMNS, side=160),
            f"{label}, {nfe} NFE: those of the first {NUM_SHOWN} images that are nearest to a training image",
        )
        for label, nfe, (generated, training) in neighbours
    )
    small = " Fréchet distances of so few images are biased upwards." if settings["num_images"] < SMALL_BELOW else ""
    header = ["entry", "NFE", distance, "KID ×10³", "precision", "recall", "memorised %", "ms per image"]
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
<p>{html.escape(budget)}; {settings["num_images"]} generated images a set against {settings["num_reference"]} of
<code>{html.escape(settings["reference"])}</code>, features of {html.escape(settings["extractor"])};
{len(settings["seeds"])} sampling seeds, mean (least–greatest); one training seed; {html.escape(where)},
torch {html.escape(computer["torch"])}.{small}</p>
<pre>{html.escape(result["command"])}</pre>
<h2>Ratios</h2>
{table(["ratio", "value"], ratio_rows)}
<h2>What no entry can beat</h2>
{table(["set", distance], lines)}
<h2>Curves</h2>
{"".join(figure(path, caption) for path, caption in plots)}
<h2>Images</h2>
{shown}
<h2>Scores</h2>
{table(header, score_rows(result))}
<p class="note">Memorised: nearer, in the features' Euclidean distance, to a training image than 99 % of the held-out
images are. The entry {GAUSSIAN} is a Gaussian fitted to the training latents.</p>
<h2>Nearest training images</h2>
{near}
<h2>What it cost</h2>
{table(["entry", "million parameters", "steps", "s per step", "training minutes", "peak MB"], entries)}
<p class="note">Training minutes are steps times seconds per step, measured in turns on an idle machine. Peak MB is the
resident memory of the process that trained, libraries included, or what a GPU allocated.</p>
{table(["one NFE (decode: all) of one image", "ms"], speed)}
<p class="note">Measured in turns, medians of 7, in batches of 32, without decoding.</p>
</body>
</html>
"""
