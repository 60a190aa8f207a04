"""The stages of a comparison: each leaves files and is skipped where these are there.

A killed comparison goes on where it was. In the comparison's folder:

    train_run         runs/RUN/               the run folder, and its pipeline in float16, which is what is sampled
    make_sets         samples/…               features of the generated images, and the first images
    Scorer.real       real-….safetensors      features of held-out and training images and of reconstructions

In the export folder, from which another machine goes on (`exports.py`):

    measure_costs     costs.json              seconds of a training step of each entry, measured in turns
    finish_run        RUN/                    scores, pipeline and images
    finish_gaussian   gaussian/               the same of the fitted Gaussian
    finish_real       real/                   scores of real and of reconstructed images
    measure_speed     speed.json              seconds of one NFE per image, measured in turns

`summary.py` makes the results of the export folder alone, and `report.py` the page. Training time is steps times
measured seconds per step: other work on the machine leaves its mark on the wall clock.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache as cached
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from latent_dmmd.baselines import GaussianFit
from latent_dmmd.data.autoencoder import load_autoencoder, standardise
from latent_dmmd.experiments.compare import DECODE, GAUSSIAN, Comparison, Run, Sets, merged
from latent_dmmd.experiments.exports import (
    finished,
    first_run,
    holds_sets,
    made_by,
    pipeline_of,
    read_finished,
    read_measured,
    save_grids,
    save_half,
    scored_alike,
    scored_as,
    write_finished,
    write_run,
)
from latent_dmmd.experiments.grids import NUM_IMAGES, image_grid, nearest_grid, shown_nfe
from latent_dmmd.experiments.scoring import Scorer, holds, seen_by
from latent_dmmd.experiments.summary import summarise
from latent_dmmd.experiments.workers import in_a_process, machine, sampling_costs, step_costs, train_and_measure
from latent_dmmd.latent_pipeline import FlowOptions, LatentPipeline
from latent_dmmd.methods.flow_matching import FlowMatchingConfig
from latent_dmmd.pipeline import load_pipeline
from latent_dmmd.training.config import Config
from latent_dmmd.training.setup import load_particles
from latent_dmmd.utils.errors import check
from latent_dmmd.utils.files import write_json
from latent_dmmd.utils.images import to_uint8
from latent_dmmd.utils.process import default_device

DECODED_AT_ONCE = 4  # fastest on a CPU
NOT_SCORED = {"scored": None, "sets": [], "images": []}
Draw = Callable[[int, torch.Generator], Tensor]


def run_comparison(comparison: Comparison) -> dict | None:
    """All stages, or none with `rebuild`, and the results; with `only`, these runs and None."""
    only = comparison.config.only
    if comparison.config.rebuild:
        return summarise(comparison)
    costs, scorer = measure_costs(comparison), Scorer(comparison)
    for run in comparison.runs:
        if only is None or run.name in only:
            finish_run(comparison, run, costs, scorer)
    if only is not None:
        return None
    finish_gaussian(comparison, scorer)
    finish_real(comparison, scorer)
    measure_speed(comparison)
    return summarise(comparison)


def measure_costs(comparison: Comparison) -> dict[str, dict]:
    """Seconds and parameters of a training step of every entry, measured in turns, once; as given if they are.

    Nothing is measured where no run is left to train. Raises ConfigError if a given file lacks an entry.
    """
    path, given = comparison.export_dir / "costs.json", comparison.config.costs
    names = list(dict.fromkeys(run.entry for run in comparison.to_train))
    if not names:
        return {}
    if given is not None:
        known = read_measured(Path(given), names, given=True)
        write_json(path, known)
        return known
    known = read_measured(path, names, given=False)
    if known is None and all(finished(comparison, run) for run in comparison.to_train):
        return {}
    if known is None:
        # all of them again: only figures of one measurement are compared
        known = in_a_process(step_costs, {name: cost_config(comparison, name) for name in names})
        write_json(path, known)
    return known


def cost_config(comparison: Comparison, entry: str) -> Config:
    """The configuration whose steps and sampling are measured: flow matching for an entry that learns from a pipeline,
    which passes as many particles through the same network."""
    config = comparison.entries[entry]
    return replace(config, objective=FlowMatchingConfig()) if hasattr(config.objective, "teacher") else config


def finish_run(comparison: Comparison, run: Run, costs: dict[str, dict], scorer: Scorer) -> None:
    """Train a run and leave its pipeline; sample, score and leave its scores. What it left before is not done again."""
    found, loaded = finished(comparison, run), run.name in comparison.config.trained
    asked = [(sets.label, *key) for sets in comparison.sets(run, "") for key in sets.files]
    if holds_sets(comparison, found, asked):
        return
    _ = scorer.nets  # a network that is missing is missed before training
    facts, folder = obtain(comparison, run, found, costs, scorer)
    scores = {"name": run.name, "entry": run.entry, "training_seed": run.seed, "machine": machine(), **facts}
    if found is None and not loaded:
        write_run(comparison, run, scores | NOT_SCORED, folder, {})  # another machine can score it
    all_sets = comparison.sets(run, "trained" if loaded else f"{facts['num_steps']}-steps")
    scored = make_sets(scorer, run.name, all_sets, drawing(folder), made_by(comparison, run))
    is_first = run == first_run(comparison, run.entry)
    grids, images = show_sets(comparison, scorer, run.entry, all_sets) if is_first else ({}, [])
    scores |= {"scored": scored_as(comparison), "sets": scored, "images": images}
    write_run(comparison, run, scores, None if loaded else folder, grids)


def obtain(
    comparison: Comparison, run: Run, found: dict | None, costs: dict[str, dict], scorer: Scorer
) -> tuple[dict, Path | str]:
    """Facts and pipeline of a run: loaded, as it left them where other sets are asked for, or trained."""
    if run.name in comparison.config.trained:
        return {"trained": comparison.config.trained[run.name]}, pipeline_of(comparison, run)
    if found is not None:
        names = ("trained", "budget", "num_steps", "entry_facts", "machine")
        kept = scored_alike(comparison, found.get("curve_scored") or found["scored"])
        curve = {"curve": found["curve"] if kept else [], "curve_scored": scored_as(comparison)}
        return {name: found[name] for name in names} | curve, pipeline_of(comparison, run)
    return train_run(comparison, run, costs, scorer)


def train_run(comparison: Comparison, run: Run, costs: dict[str, dict], scorer: Scorer) -> tuple[dict, Path]:
    """Train a run to its number of steps; its facts and its pipeline in float16. An entry's first run stops at every
    milestone.

    Raises ConfigError if its folder holds another training, or a longer one.
    """
    config, cost = comparison.config, costs[run.entry]
    steps, source = comparison.num_steps(costs)[run.entry], comparison.run_folder(run) / "half"
    curve, milestones = [], config.milestones if run == first_run(comparison, run.entry) else []
    for share in (*sorted(milestones), 1):
        reached = max(1, round(share * steps))
        if not train_to(comparison, run, scorer, reached, steps):
            print(f"{run.name}: no scores at {reached} steps, which it has passed")
            continue
        if share < 1:
            sets = comparison.sets(run, f"{reached}-steps", milestone=True)
            scored = make_sets(scorer, run.name, sets, drawing(source), made_by(comparison, run))
            minutes = reached * cost["seconds"] / 60
            curve += [{**row, "num_steps": reached, "minutes": minutes} for row in scored]
    record = json.loads((comparison.run_folder(run) / "trained.json").read_text())
    facts = {
        "num_parameters": cost["num_parameters"],
        "num_steps": steps,
        "seconds_per_step": cost["seconds"],
        "training_minutes": steps * cost["seconds"] / 60,
        "resident_mb": record.get("resident_mb"),
        "keys": merged(config.common, config.entries[run.entry]),
    }
    budget = {"minutes": config.minutes, "num_steps": config.num_steps}
    made = {"trained": None, "budget": budget, "num_steps": steps, "entry_facts": facts, "curve": curve}
    return made | {"curve_scored": scored_as(comparison)}, source


def train_to(comparison: Comparison, run: Run, scorer: Scorer, reached: int, last: int) -> bool:
    """Train a run to a number of steps, in a process of its own; false if it has passed it without its sets."""
    folder, made = comparison.run_folder(run), made_by(comparison, run)
    path = folder / "trained.json"
    record = json.loads(path.read_text()) if path.exists() else {"num_steps": 0}
    check(
        record.get("made_by", made) == made,
        f"{folder} holds a training with other keys; remove it or choose another --output_dir",
    )
    if record["num_steps"] > reached:
        check(
            reached < last,
            f"{folder} has been trained longer, for {record['num_steps']} steps instead of {last}; choose another "
            "--output_dir",
        )
        sets = comparison.sets(run, f"{reached}-steps", milestone=True)
        return all(holds(file, scorer.made_for(made)) for each in sets for file in each.files.values())
    if record["num_steps"] < reached:
        print(f"{run.name}: training to {reached} of {last} steps")
        resident_mb = in_a_process(train_and_measure, training_config(comparison, run, reached))
        save_half(folder / "pipeline", folder / "half")
        resident_mb = max(record.get("resident_mb") or 0, resident_mb or 0) or None
        write_json(path, {"num_steps": reached, "resident_mb": resident_mb, "made_by": made})
    return True


def training_config(comparison: Comparison, run: Run, num_steps: int) -> Config:
    """The configuration that a run is trained by; a teacher that is an entry is the folder of its first run."""
    config, teacher = comparison.config_of(run, num_steps), comparison.teacher(run.entry)
    if teacher is None:
        return config
    return replace(config, objective=replace(config.objective, teacher=str(pipeline_of(comparison, teacher))))


def make_sets(
    scorer: Scorer, name: str, all_sets: list[Sets], draw_of: Callable[[int, dict], Draw], source: str
) -> list[dict]:
    """Generate the sets of a run that are missing, and score them all; one row each.

    Args:
        scorer: What scores them.
        name: The run.
        all_sets: The sets.
        draw_of: From NFE and options of the pipeline's call to what draws images.
        source: What makes them; a set of something else is generated again.
    """
    rows = []
    for sets in all_sets:
        for (nfe, seed), path in sets.files.items():
            scorer.make_set(path, f"{name}: {sets.label}, {nfe} NFE", seed, draw_of(nfe, sets.options), source)
            scores, *second = scorer.score_set(path)
            row = {"label": sets.label, "nfe": nfe, "seed": seed, "scores": scores}
            rows.append(row | ({"second": second[0]} if second else {}))
    return rows


def drawing(folder: Path | str) -> Callable[[int, dict], Draw]:
    """What draws images by the pipeline of a folder, for each NFE and options; it is loaded when it is needed."""
    pipe = cached(partial(load_for_sets, folder))
    return lambda nfe, options: partial(generate, pipe, {"num_inference_steps": nfe, **options})


def load_for_sets(folder: Path | str) -> LatentPipeline:
    """A pipeline that takes all particles in one chunk: the exact witness needs no second forward then."""
    pipe = load_pipeline(folder)
    pipe.flow_options = FlowOptions(chunk_size=None)
    return pipe


def generate(pipe: Callable[[], LatentPipeline], sampling: dict, n: int, generator: torch.Generator) -> Tensor:
    """Images, uint8 with shape (n, 3, R, R)."""
    return decode(pipe(), pipe()(n, generator=generator, output_type="latent", **sampling).images)


def decode(pipe: LatentPipeline, z: Tensor) -> Tensor:
    """uint8 images (n, 3, R, R) of standardised particles, few at a time: decoding takes the most memory."""
    return torch.cat([to_uint8(pipe.decode_to_pixels(chunk)).cpu() for chunk in z.split(DECODED_AT_ONCE)])


def show_sets(comparison: Comparison, scorer: Scorer, entry: str, all_sets: list[Sets]) -> tuple[dict, list[dict]]:
    """The grids of an entry's sets by file name, and what each shows: the first images, and those nearest to a
    training image for the entries that are held against each other."""
    grids, shown = {}, []
    for sets in all_sets:
        numbers = shown_nfe([nfe for nfe, _ in sets.files])
        for nfe in numbers:
            path = next(path for key, path in sets.files.items() if key[0] == nfe)
            slug = f"{sets.label}-{nfe}".replace(" ", "-")
            grids[f"{slug}.webp"] = image_grid(load_file(path)["images"])
            shown.append({"kind": "grid", "label": sets.label, "nfe": nfe, "file": f"{slug}.webp"})
            if nfe == max(numbers) and entry in (comparison.config.dmmd, comparison.config.baseline):
                training = comparison.load_images(comparison.training_data)
                grids[f"{slug}-nearest.webp"] = nearest_grid(path, scorer.real[0]["training"], training)
                shown.append({"kind": "nearest", "label": sets.label, "nfe": nfe, "file": f"{slug}-nearest.webp"})
    return grids, shown


def finish_gaussian(comparison: Comparison, scorer: Scorer) -> None:
    """Sample and score the Gaussian that is fitted to the training latents."""
    folder, sets = comparison.export_dir / GAUSSIAN, comparison.gaussian_sets()
    if holds_sets(comparison, read_finished(folder), [(GAUSSIAN, *key) for key in sets.files]):
        return
    fitted = cached(partial(fit_gaussian, comparison))
    source = f"{GAUSSIAN} {seen_by(comparison)}"
    scored = make_sets(scorer, GAUSSIAN, [sets], lambda *_: lambda n, generator: fitted()(n, generator), source)
    grids, shown = show_sets(comparison, scorer, GAUSSIAN, [sets])
    scores = {"name": GAUSSIAN, "scored": scored_as(comparison), "sets": scored, "images": shown}
    write_finished(folder, scores, lambda aside: save_grids(grids, aside))


def fit_gaussian(comparison: Comparison) -> Draw:
    """A sampler of uint8 images from the Gaussian fitted to the training latents."""
    name = comparison.config.dmmd
    pipe = load_pipeline(pipeline_of(comparison, first_run(comparison, name)))
    config = comparison.entries[name]
    vae = load_autoencoder(config.autoencoder.name_or_path, default_device())  # not rounded: its latents are encoded
    cache = load_particles(vae, comparison.load_images(comparison.training_data), config)
    fit = GaussianFit(standardise(cache.mean[:, 0], cache.channel_mean, cache.channel_std))
    return lambda n, generator: decode(pipe, fit.draw(n, generator).to(pipe.device))


def finish_real(comparison: Comparison, scorer: Scorer) -> None:
    """Score real and reconstructed images, and leave some held-out ones to be shown."""
    folder, found = comparison.export_dir / "real", read_finished(comparison.export_dir / "real")
    if found is not None and scored_alike(comparison, found["scored"]):
        return
    reference = comparison.load_images(comparison.config.reference)
    counts = {name: len(scorer.real[0][name]) for name in ("reference", "training")}
    grids = {"heldout.webp": image_grid(reference.examples(NUM_IMAGES, seed=0))}
    shown = [{"kind": "grid", "label": "held-out images", "nfe": 0, "file": "heldout.webp"}]
    scores = {"scored": scored_as(comparison), "counts": counts, "context": scorer.context(), "images": shown}
    write_finished(folder, scores, lambda aside: save_grids(grids, aside))


def measure_speed(comparison: Comparison) -> dict[str, dict]:
    """Seconds of one NFE per image, without decoding, for every label, and of decoding one; measured in turns, once,
    or as given."""
    path, given = comparison.export_dir / "speed.json", comparison.config.speed
    entries = comparison.config.entries
    ways = {label: (name, options) for name in entries for label, options in comparison.ways(name).items()}
    if given is not None:
        known = read_measured(Path(given), [*ways, DECODE], given=True)
        write_json(path, known)
        return known
    known = read_measured(path, [*ways, DECODE], given=False)
    if known is None:
        # all of them again: only figures of one measurement are compared
        loaded = comparison.config.trained
        sources = {
            name: loaded.get(first_run(comparison, name).name) or cost_config(comparison, name) for name in entries
        }
        known = in_a_process(sampling_costs, sources, ways, comparison.config.dmmd)
        write_json(path, known)
    return known
