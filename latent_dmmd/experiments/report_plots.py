"""The plots of a report, as PNG files."""

import math
from collections.abc import Callable
from pathlib import Path

from latent_dmmd.experiments.estimates import estimate
from latent_dmmd.experiments.summary import level_of

LINES = {"floor": ":", "reconstructed training images": "--", "reconstruction": "-"}


def plot_results(result: dict, folder: Path, prefix: str) -> list[tuple[Path, str]]:
    """All plots of a data set: file and caption."""
    settings = result["settings"]
    second, name = settings["second_distance"], settings["distance"]
    plots = [
        ("distance_time", "frechet_distance", name, seconds_of, ""),
        ("distance_nfe", "frechet_distance", name, nfe_of, ""),
        ("recall_nfe", "recall", "recall", nfe_of, ""),
        ("coverage_nfe", "coverage", "coverage", nfe_of, ""),
        ("kid_nfe", "kid_mean", "KID", nfe_of, ""),
    ]
    plots += [("second_distance_nfe", "frechet_distance", second, nfe_of, "second")] if second else []
    found = []
    for file, score, title, x_of, space in plots:
        path = folder / f"{prefix}{file}.png"
        x_label = "seconds per image, decoding included" if x_of is seconds_of else "NFE"
        draw = drawn_rows(result, score, x_of, space)
        if draw is None:
            continue
        plot(path, draw, x_label, title, levels(result, score, space))
        found.append((path, f"{title} over {x_label}; {what(result)}"))
    if result["curves"]:
        path = folder / f"{prefix}distance_minutes.png"
        numbers = sorted({point["nfe"] for point in result["curves"]})  # of a generator in one step another
        text = f"training minutes ({' or '.join(map(str, numbers))} NFE)"
        plot(path, drawn_curves(result), text, name, levels(result, "frechet_distance", ""))
        found.append((path, f"{name} over {text}; {what(result)}"))
    return found


def what(result: dict) -> str:
    """What a caption says of the sets."""
    settings = result["settings"]
    return (
        f"n = {settings['num_images']} generated, {settings['num_reference']} held out; means over training seeds, "
        "bars: their standard error, where there are several"
    )


def nfe_of(row: dict) -> float:
    return row["nfe"]


def seconds_of(row: dict) -> float | None:
    return row["seconds_per_image"]


def levels(result: dict, score: str, space: str) -> dict[str, float]:
    """What a distance is held against, drawn as lines: above all the autoencoder's share."""
    if score != "frechet_distance":
        return {}
    context = result["context"][result["settings"]["second_extractor" if space else "extractor"]]
    values = (context["floor_distance"], level_of(result, space), context["reconstruction_distance"])
    return dict(zip(LINES, values))


def drawn_rows(result: dict, score: str, x_of: Callable[[dict], float | None], space: str) -> dict | None:
    """Label to x, means and errors of a score, NaN of one training seed; None where no row has an x.

    x is None for rows without NFE. A label whose rows have no x is kept without points, so that the others have the
    colours of the other plots.
    """
    drawn = {}
    for label in dict.fromkeys(row["label"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["label"] == label and x_of(row) is not None]
        x = [x_of(row) for row in rows if row["nfe"]]
        scores = means_and_errors([(row[space] if space else row)[score] for row in rows])
        drawn[label] = None if rows and not x else x, *scores
    return drawn if any(means for _, means, _ in drawn.values()) else None


def drawn_curves(result: dict) -> dict:
    """The same of distances over training minutes, in the colours of the other plots."""
    drawn = {}
    for label in dict.fromkeys(row["label"] for row in result["rows"]):
        points = sorted((p for p in result["curves"] if p["label"] == label), key=lambda point: point["minutes"])
        drawn[label] = [p["minutes"] for p in points], *means_and_errors([p["frechet_distance"] for p in points])
    return drawn


def means_and_errors(values: list[list[float]]) -> tuple[list[float], list[float]]:
    """Means over training seeds, and their standard errors: NaN, which draws no bar, of one seed."""
    found = [estimate(each) for each in values]
    return [v.mean for v in found], [math.nan if v.error is None else v.error for v in found]


def plot(path: Path, drawn: dict, x_label: str, title: str, lines: dict[str, float]) -> None:
    """One plot: a line with bars for every label, a level for what has no x, and grey lines."""
    from matplotlib.figure import Figure  # not pyplot, whose backend is the caller's
    from matplotlib.ticker import FixedLocator, LogLocator

    figure = Figure(figsize=(6.4, 4.8))
    axis = figure.subplots()
    for i, (label, (x, means, errors)) in enumerate(drawn.items()):
        if x is None:
            axis.axhline(means[0], color=f"C{i % 10}", linestyle="-.", linewidth=1, label=label)
        elif x:
            style = dict(marker="os^Dv"[i // 10 % 5], markersize=4, capsize=3, color=f"C{i % 10}")
            axis.errorbar(x, means, errors, label=label, **style)
    axis.set_xscale("log")
    values = sorted({value for x, _, _ in drawn.values() for value in x or ()})
    plain_ticks(axis.xaxis, FixedLocator(legible(values)) if x_label == "NFE" else LogLocator(subs=(1, 2, 5)))
    for (label, value), style in zip(lines.items(), LINES.values()):
        axis.axhline(value, color="grey", linestyle=style, linewidth=1, label=label)
    if lines:
        axis.set_yscale("log")
        plain_ticks(axis.yaxis, LogLocator(subs=(1, 2, 3, 5)))
    axis.grid(alpha=0.3)
    axis.set_xlabel(x_label)
    axis.set_ylabel(f"{title} ({'higher' if title in ('recall', 'coverage') else 'lower'} is better)")
    axis.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def legible(values: list[float], gap: float = 0.05) -> list[float]:
    """Rising positive numbers without those whose labels would touch the one before on a logarithmic axis.

    Args:
        values: The numbers.
        gap: The least distance, as a share of the axis.
    """
    kept = values[:1]
    for value in values[1:]:
        if math.log(value / kept[-1]) >= gap * math.log(values[-1] / values[0]):
            kept.append(value)
    return kept


def plain_ticks(axis, locator) -> None:
    """Ticks where a locator puts them, as plain numbers, and none between."""
    from matplotlib.ticker import NullLocator, ScalarFormatter

    axis.set_major_locator(locator)
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_locator(NullLocator())
