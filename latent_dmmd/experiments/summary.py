"""The results of a comparison as plain values, made of what its stages measured."""

import json
import statistics

import torch
from torch import Tensor

from latent_dmmd.experiments.compare import GAUSSIAN, MATCHED_FACTOR, MATCHED_UP_TO, Comparison, merged
from latent_dmmd.experiments.workers import machine
from latent_dmmd.metrics.extractors import (
    EXTRACTORS,
)
from latent_dmmd.metrics.scores import frechet_distance


def seconds_per_image(comparison: Comparison, label: str, nfe: int, speed: dict[str, dict]) -> float:
    """What an image takes by these speeds, decoding included."""
    on_pixels = [name for name, entry in comparison.entries.items() if entry.autoencoder.name_or_path is None]
    decoding = 0 if any(label in comparison.ways(name) for name in on_pixels) else speed["decode"]["seconds"]
    return decoding + (nfe * speed[label]["seconds"] if label != GAUSSIAN else 0)


def summarise(
    comparison: Comparison,
    costs: dict[str, dict],
    scores: dict[str, dict[int, dict[str, list[float]]]],
    real: dict[str, Tensor],
    speed: dict[str, dict],
) -> dict:
    """Everything that the report shows, but for the images, as plain values."""
    config, steps, entries = comparison.config, comparison.num_steps(costs), {}
    for name in comparison.to_train:
        record = json.loads((comparison.folder / "runs" / name / "trained.json").read_text())
        entries[name] = {
            "num_parameters": costs[name]["num_parameters"],
            "num_steps": steps[name],
            "seconds_per_step": costs[name]["seconds"],
            "training_minutes": steps[name] * costs[name]["seconds"] / 60,
            "peak_mb": record["peak_mb"],
            "keys": merged(config.common, config.entries[name]),
        }
    rows = []
    for label, by_nfe in scores.items():
        for nfe, score in sorted(by_nfe.items()):
            seconds = seconds_per_image(comparison, label, nfe, speed)
            rows.append({"label": label, "nfe": nfe, "seconds_per_image": seconds, **score})
    order = torch.randperm(len(real["training"]), generator=torch.Generator().manual_seed(0), device="cpu")
    n, m, half = config.num_images, len(real["reference"]), len(order) // 2
    floor = real["training"][order[: min(n, half)]], real["training"][order[-min(m, half) :]]
    result = {
        "settings": {
            "num_images": n,
            "num_reference": m,
            "num_training": len(real["training"]),
            "reference": config.reference,
            "extractor": config.extractor,
            "distance": EXTRACTORS[config.extractor].distance_name,
            "seeds": config.seeds,
            "minutes": config.minutes,
            "steps": config.num_steps,
            "dmmd": config.dmmd,
            "baseline": config.baseline,
            "pixel": config.pixel,
            "trained": config.trained,
        },
        "machine": machine(),
        "floor_distance": frechet_distance(*floor),
        "reconstruction_distance": frechet_distance(real["reconstructions"], real["reference"]),
        "reconstructed_training_distance": frechet_distance(real["reconstructed_training"], real["reference"]),
        "entries": entries,
        "rows": rows,
        "speed": speed,
    }
    return result | {"ratios": ratios(result)}


def mean_of(result: dict, label: str, nfe: int, name: str = "frechet_distance") -> float | None:
    """The mean over seeds of a score; None if there is no such row."""
    for row in result["rows"]:
        if row["label"] == label and row["nfe"] == nfe:
            return statistics.fmean(row[name])
    return None


def ratios(result: dict) -> dict[str, float]:
    """The ratios that the comparison is about, by what each is; those of sets that are not there are left out."""
    settings, reconstruction = result["settings"], result["reconstruction_distance"]
    exact, stored = (f"{settings['dmmd']} {sampler}" for sampler in ("exact", "approximate"))
    baseline, pixel = settings["baseline"], f"{settings['pixel']} exact"
    seconds = {name: cost["seconds"] for name, cost in result["speed"].items()}

    def distance(label: str, nfe: int, above: float = 0.0) -> float | None:
        mean = mean_of(result, label, nfe)
        return None if mean is None else mean - above

    found: dict[str, tuple[float | None, float | None]] = {}
    for label in (exact, stored):
        for nfe in (100, 10):
            text = f"{label} ÷ {baseline}, distance above the reconstruction's, {nfe} NFE"
            found[text] = distance(label, nfe, reconstruction), distance(baseline, nfe, reconstruction)
    for nfe in sorted({row["nfe"] for row in result["rows"] if 0 < row["nfe"] <= MATCHED_UP_TO}):
        matched = MATCHED_FACTOR * nfe
        text = f"{stored} at {nfe} NFE ÷ {baseline} at {matched} NFE, distance"
        found[text] = distance(stored, nfe), distance(baseline, matched)
    found[f"{pixel} ÷ {exact}, distance, 100 NFE"] = distance(pixel, 100), distance(exact, 100)
    found[f"{exact}, 100 NFE ÷ reconstruction, distance"] = distance(exact, 100), reconstruction
    for label in (exact, stored):
        found[f"{label} ÷ {baseline}, time of one NFE per image"] = seconds.get(label), seconds.get(baseline)
    for label in (exact, stored):
        share = mean_of(result, label, 100, "memorised_share")
        found[f"{label}, 100 NFE, share of memorised images"] = share, 1.0
    return {text: a / b for text, (a, b) in found.items() if a is not None and b is not None}
