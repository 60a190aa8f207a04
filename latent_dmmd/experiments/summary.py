"""The results of a comparison as plain values, made of what its finished runs left."""

import statistics
from pathlib import Path

from latent_dmmd.experiments.compare import DECODE, GAUSSIAN, MATCHED_FACTOR, MATCHED_UP_TO, Comparison
from latent_dmmd.experiments.estimates import Estimate, estimate, interpolated
from latent_dmmd.experiments.exports import finished, read_finished, read_measured, scored_alike
from latent_dmmd.metrics.extractors import EXTRACTORS
from latent_dmmd.utils.errors import ConfigError


def summarise(comparison: Comparison) -> dict:
    """Everything that the report shows, but for the images, as plain values.

    Raises ConfigError if nothing is finished that could be shown.
    """
    folder, config = comparison.export_dir, comparison.config
    real, found = read_finished(folder / "real"), finished_runs(comparison)
    if real is None or not scored_alike(comparison, real["scored"]) or not found:
        raise ConfigError(f"{folder} holds no finished run of this comparison; run it without --rebuild first")
    given = [Path(config.speed)] if config.speed else []
    speeds = (read_measured(path, [], given=False) for path in (*given, folder / "speed.json"))
    speed = next((seconds for seconds in speeds if seconds), {})
    rows = score_rows(comparison, found, speed)
    context = real["context"][config.extractor]
    result = {
        "settings": settings(comparison, real["counts"]),
        "machine": found[0].get("machine") or {},
        "machines": distinct([scores["machine"] for scores in found if scores.get("machine")]),
        "floor_distance": context["floor_distance"],
        "reconstruction_distance": context["reconstruction_distance"],
        "reconstructed_training_distance": context["reconstructed_training"]["frechet_distance"],
        "context": real["context"],
        "entries": {s["entry"]: s["entry_facts"] for s in reversed(found) if "entry_facts" in s},
        "rows": rows,
        "curves": curves(found, rows),
        "speed": speed,
        "images": [
            {**image, "file": f"{name}/{image['file']}"}
            for name, scores in [("real", real), *((s["name"], s) for s in found)]
            for image in scores["images"]
        ],
    }
    result["entries"] = {name: result["entries"][name] for name in config.entries if name in result["entries"]}
    return result | {"ratios": ratios(result)}


def settings(comparison: Comparison, counts: dict[str, int]) -> dict:
    """What the report says of how sets were made and scored."""
    config = comparison.config
    copied = (
        "num_images batch_size reference extractor second_extractor seeds minutes dmmd baseline pixel pixel_baseline"
        " trained table"
    )
    return {name: getattr(config, name) for name in copied.split()} | {
        "name": config.data,
        "training": comparison.training_data,
        "num_reference": counts["reference"],
        "num_training": counts["training"],
        "distance": EXTRACTORS[config.extractor].distance_name,
        "second_distance": config.second_extractor and EXTRACTORS[config.second_extractor].distance_name,
        "steps": config.num_steps,
    }


def finished_runs(comparison: Comparison) -> list[dict]:
    """What the finished runs left, in the order of entries and seeds; of the others it says that they are left out."""
    found = []
    for run in comparison.config.runs:
        scores = finished(comparison, run)
        if scores is None or not scored_alike(comparison, scores["scored"]):
            why = "not finished" if scores is None else "scored otherwise" if scores.get("scored") else "not scored yet"
            print(f"{run.name}: {why}, left out")
        else:
            found.append(scores)
    gaussian = read_finished(comparison.export_dir / GAUSSIAN)
    if found and gaussian is not None and scored_alike(comparison, gaussian["scored"]):
        found.append({**gaussian, "entry": GAUSSIAN})
    return found


def distinct(values: list) -> list:
    """The different ones of some values, in their order."""
    return [value for i, value in enumerate(values) if value not in values[:i]]


def over_seeds(rows: list[dict], key: str = "scores") -> dict[str, float]:
    """Means of the scores of a run over sampling seeds."""
    return {name: statistics.fmean(row[key][name] for row in rows) for name in rows[0][key]}


def over_runs(scores: list[dict[str, float]]) -> dict[str, list[float]]:
    """Lists over runs, one value of each training seed."""
    return {name: [score[name] for score in scores] for name in scores[0]}


def score_rows(comparison: Comparison, found: list[dict], speed: dict[str, dict]) -> list[dict]:
    """One row for each way of sampling and NFE: its scores are lists over training seeds, of means over sampling seeds;
    under `second` those by the second extractor."""
    rows = []
    for label, nfe in distinct([(s["label"], s["nfe"]) for scores in found for s in scores["sets"]]):
        of_runs = [[s for s in scores["sets"] if (s["label"], s["nfe"]) == (label, nfe)] for scores in found]
        of_runs = [sets for sets in of_runs if sets]
        entry = next(scores["entry"] for scores in found if any(s["label"] == label for s in scores["sets"]))
        row = {"label": label, "entry": entry, "nfe": nfe, "num_sampling_seeds": max(map(len, of_runs))}
        row["seconds_per_image"] = seconds_per_image(comparison, entry, label, nfe, speed)
        row |= over_runs([over_seeds(sets) for sets in of_runs])
        if "second" in of_runs[0][0]:
            row["second"] = over_runs([over_seeds(sets, "second") for sets in of_runs])
        rows.append(row)
    order = list(dict.fromkeys(row["label"] for row in rows))
    return sorted(rows, key=lambda row: (order.index(row["label"]), row["nfe"]))


def seconds_per_image(comparison: Comparison, entry: str, label: str, nfe: int, speed: dict[str, dict]) -> float | None:
    """What an image takes by these speeds, decoding included; None where they were not measured."""
    on_pixels = entry != GAUSSIAN and comparison.entries[entry].autoencoder.name_or_path is None
    needed = [] if entry == GAUSSIAN else [(label, nfe)]
    needed += [] if on_pixels else [(DECODE, 1)]
    if any(name not in speed for name, _ in needed):
        return None
    return sum(times * speed[name]["seconds"] for name, times in needed)


def curves(found: list[dict], rows: list[dict]) -> list[dict]:
    """Distances over training minutes: of first runs at milestones, of all at the end where the same NFE was scored."""
    points = [{**point, "entry": scores["entry"]} for scores in found for point in scores.get("curve") or []]
    facts = {scores["entry"]: scores["entry_facts"] for scores in found if "entry_facts" in scores}
    result = []
    for label, steps in distinct([(point["label"], point["num_steps"]) for point in points]):
        same = [point for point in points if (point["label"], point["num_steps"]) == (label, steps)]
        values = over_runs([point["scores"] for point in same])
        result.append({"label": label, "nfe": same[0]["nfe"], "minutes": same[0]["minutes"], **values})
    milestones = {(point["label"], point["nfe"]) for point in result}
    for row in rows:
        if row["entry"] in facts and (row["label"], row["nfe"]) in milestones:
            minutes = facts[row["entry"]]["training_minutes"]
            result.append({name: row[name] for name in ("label", "nfe", "frechet_distance")} | {"minutes": minutes})
    return result


def score_of(result: dict, label: str, nfe: int, name: str = "frechet_distance", space: str = "") -> Estimate | None:
    """A score over training seeds; None if there is no such row. `space` "second" is the second extractor's."""
    for row in result["rows"]:
        if row["label"] == label and row["nfe"] == nfe:
            scores = row[space] if space else row
            return estimate(scores[name])
    return None


def level_of(result: dict, space: str = "", name: str = "frechet_distance") -> float:
    """The distance of reconstructed training images: what perfect latents would score."""
    extractor = result["settings"]["second_extractor" if space else "extractor"]
    return result["context"][extractor]["reconstructed_training"][name]


def excess_of(result: dict, label: str, nfe: int, space: str = "") -> Estimate | None:
    """The distance above that of reconstructed training images; None if there is no such row."""
    distance = score_of(result, label, nfe, space=space)
    return None if distance is None else distance.above(level_of(result, space))


def excess_ratio(result: dict, row: dict, space: str = "") -> Estimate | None:
    """The excess of a row over that of the baseline at the same NFE; None if there is none, and for itself."""
    if row["label"] == result["settings"]["baseline"]:
        return None
    ours = excess_of(result, row["label"], row["nfe"], space)
    theirs = excess_of(result, result["settings"]["baseline"], row["nfe"], space)
    return None if theirs is None else ours.over(theirs)


def equal_time_ratio(result: dict, row: dict) -> Estimate | None:
    """The excess of a row over that of the baseline at equal seconds per image, between its NFE; None outside, and for
    itself."""
    if row["label"] == result["settings"]["baseline"]:
        return None
    points = [
        (other["seconds_per_image"], other["frechet_distance"])
        for other in result["rows"]
        if other["label"] == result["settings"]["baseline"] and other["seconds_per_image"]
    ]
    theirs = interpolated(points, row["seconds_per_image"]) if row["seconds_per_image"] else None
    if theirs is None:
        return None
    return excess_of(result, row["label"], row["nfe"]).over(estimate(theirs).above(level_of(result)))


def ratios(result: dict) -> dict[str, dict[str, float | None]]:
    """The ratios that the comparison is about, `mean` and `error` by what each is; without missing sets."""
    settings, found = result["settings"], {}
    exact, stored = (f"{settings['dmmd']} {sampler}" for sampler in ("exact", "approximate"))
    baseline, pixel = settings["baseline"], f"{settings['pixel']} exact"
    pairs: list[tuple[str, Estimate | None, Estimate | None]] = []
    for label in (exact, stored):
        for space in ("", "second") if settings["second_extractor"] else ("",):
            by = f", {settings['second_distance']}" if space else ""
            for nfe in (100, 10):
                text = f"{label} ÷ {baseline}, distance above reconstructed training images, {nfe} NFE{by}"
                pairs.append((text, excess_of(result, label, nfe, space), excess_of(result, baseline, nfe, space)))
    for nfe in sorted({row["nfe"] for row in result["rows"] if 0 < row["nfe"] <= MATCHED_UP_TO}):
        matched = MATCHED_FACTOR * nfe
        text = f"{stored} at {nfe} NFE ÷ {baseline} at {matched} NFE, distance"
        pairs.append((text, score_of(result, stored, nfe), score_of(result, baseline, matched)))
    for label, latent in ((pixel, exact), (settings["pixel_baseline"], baseline)):
        pairs.append(
            (f"{label} ÷ {latent}, distance, 100 NFE", score_of(result, label, 100), score_of(result, latent, 100))
        )
    seconds = {name: Estimate(cost["seconds"]) for name, cost in result["speed"].items()}
    for label in (exact, stored):
        pairs.append((f"{label} ÷ {baseline}, time of one NFE per image", seconds.get(label), seconds.get(baseline)))
    for label in (exact, stored):
        share = score_of(result, label, 100, "memorised_share")
        pairs.append((f"{label}, 100 NFE, share of memorised images", share, Estimate(1.0)))
    for text, a, b in pairs:
        if a is not None and b is not None and (ratio := a.over(b)) is not None:
            found[text] = ratio._asdict()
    return found
