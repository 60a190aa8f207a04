"""What a finished run leaves for other machines: a folder of its pipeline in float16, its scores and its images.

    EXPORT_DIR/costs.json, speed.json    seconds of a training step and of an NFE, measured in turns
    EXPORT_DIR/real/                     scores of real and of reconstructed images
    EXPORT_DIR/gaussian/, RUN/           scores.json, config.yaml, pipeline/ without autoencoder, grids as WebP
    EXPORT_DIR/autoencoders/             each autoencoder once, but for bundled ones

A folder is written aside and renamed, and `scores.json` lists its files with their sizes: what is incomplete is passed
over, as if it were not there. Once a run is scored its `pipeline/` may be removed, where nothing learns from it.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch

from latent_dmmd.data.autoencoder import BUNDLED_AUTOENCODERS
from latent_dmmd.experiments.compare import Comparison, Run
from latent_dmmd.pipeline import load_pipeline
from latent_dmmd.training.config import as_dict, save_config
from latent_dmmd.training.differences import CALL, differing_keys, flatten
from latent_dmmd.utils.errors import ConfigError, check
from latent_dmmd.utils.files import write_aside, write_json

SCORES, PIPELINE = "scores.json", "pipeline"
# other values of these keys train the same weights; steps follow from the budget
NOT_COMPARED = {
    "autoencoder.batch_size",
    "data.cache_dir",
    "data.num_workers",
    "training.checkpointing_steps",
    "training.checkpoints_total_limit",
    "training.log_every",
    "training.log_with",
    "training.num_steps",
}


def write_finished(folder: Path, scores: dict, write: Callable[[Path], object]) -> None:
    """Write a folder whole or not at all: the files that `write` puts into a folder it is given, and the scores."""

    def write_all(aside: Path) -> None:
        aside.mkdir(parents=True)
        write(aside)
        files = {p.relative_to(aside).as_posix(): p.stat().st_size for p in sorted(aside.rglob("*")) if p.is_file()}
        write_json(aside / SCORES, {**scores, "files": files})

    folder.parent.mkdir(parents=True, exist_ok=True)
    write_aside(folder, write_all)


def read_finished(folder: Path) -> dict | None:
    """The scores in a folder; None unless it is there with all of its files, each of the size it had. A scored run's
    pipeline may be gone as a whole."""
    try:
        scores = json.loads((folder / SCORES).read_text())
        removed = bool(scores["scored"]) and not (folder / PIPELINE).exists()
        whole = all(
            (folder / name).stat().st_size == size
            for name, size in scores["files"].items()
            if not (removed and name.startswith(f"{PIPELINE}/"))
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return scores if whole else None


def read_measured(path: Path, names: list[str], given: bool) -> dict[str, dict] | None:
    """Measured seconds by name; None where the file lacks one of the names.

    Args:
        path: The JSON file.
        names: What must be in it.
        given: Whether the user named the file, which then must hold all.

    Raises:
        ConfigError: If a file that the user named cannot be used.
    """
    try:
        found = json.loads(path.read_text())
        missing = [name for name in names if not found[name]["seconds"] > 0] if found else names
    except KeyError as error:
        missing = [str(error.args[0])]
    except (OSError, ValueError, TypeError) as error:
        if given:
            raise ConfigError(f"cannot read measured seconds in {path}; give a file that a comparison wrote") from error
        return None
    if missing and given:
        raise ConfigError(f"{path} has no seconds of {missing[0]}; measure it, or leave the file out")
    return None if missing else found


def save_half(folder: Path, target: Path) -> None:
    """Save a pipeline with network and autoencoder in float16; mean embeddings stay in float32, whose differences are
    small."""
    pipe = load_pipeline(folder).to("cpu")
    pipe.net.half()
    if pipe.vae is not None:
        pipe.vae.half()
    target.parent.mkdir(parents=True, exist_ok=True)
    write_aside(target, pipe.save_pretrained)


def reasons_against(comparison: Comparison, run: Run, scores: dict | None) -> list[str]:
    """Why what a run left is not what the comparison asks for; none if it is."""
    config, folder = comparison.config, comparison.export_dir / run.name
    name = (scores or {}).get("autoencoder")
    if scores is None or (name and not autoencoder_of(comparison, name).is_dir()):
        return ["not finished"]
    if scores.get("trained") != config.trained.get(run.name):
        return [f"trained is {config.trained.get(run.name)} (was {scores.get('trained')})"]
    if run.name in config.trained:
        return []
    asked = {"minutes": config.minutes, "num_steps": config.num_steps}
    differing = differing_keys(comparison.config_of(run, num_steps=1), folder / "config.yaml")
    reasons = [f"{name} is {values}" for name, values in differing.items() if name not in NOT_COMPARED]
    if any(asked.values()) and scores.get("budget") != asked:
        reasons.append(f"the budget is {budget_text(asked)} (was {budget_text(scores.get('budget') or {})})")
    return reasons


def made_by(comparison: Comparison, run: Run) -> str:
    """What the images of a run are made by, but for its steps: its name and a short hash of the keys that its weights
    follow from, or the loaded pipeline."""
    if run.name in comparison.config.trained:
        return comparison.config.trained[run.name]
    values = flatten(as_dict(comparison.config_of(run, num_steps=1)))
    kept = {name: value for name, value in values.items() if name not in NOT_COMPARED and name not in CALL}
    return f"{run.name} {hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]}"


def finished(comparison: Comparison, run: Run) -> dict | None:
    """The scores of a run that need no training; None if it is to be trained. Says why if it was finished before."""
    scores = read_finished(comparison.export_dir / run.name)
    reasons = reasons_against(comparison, run, scores)
    if scores is not None and reasons:
        print(f"{run.name}: {comparison.export_dir / run.name} holds another training: {reasons[0]}")
    return None if reasons else scores


def budget_text(budget: dict) -> str:
    """Minutes or steps in words."""
    return " ".join(f"{value:g} {name.removeprefix('num_')}" for name, value in budget.items() if value is not None)


def autoencoder_of(comparison: Comparison, name: str) -> Path:
    """Where the autoencoder of finished runs with this hash of its weights lies: the bundled one, or a copy."""
    return bundled_by_hash().get(name, comparison.export_dir / "autoencoders" / name)


@cache
def bundled_by_hash() -> dict[str, Path]:
    """The bundled autoencoders by the hashes of their weights, which are read once."""
    return {weights_hash(folder): folder for folder in BUNDLED_AUTOENCODERS.values()}


def pipeline_of(comparison: Comparison, run: Run) -> Path | str:
    """The pipeline of a finished or loaded run: a bundled name, or a folder. What a finished run left is put together
    in the comparison's folder. Raises ConfigError if it is not finished, or its pipeline was removed."""
    if run.name in comparison.config.trained:
        return comparison.config.trained[run.name]
    folder, target = comparison.export_dir / run.name, comparison.folder / "pipelines" / run.name
    scores = read_finished(folder)
    check(scores is not None, f"{run.name} is needed and not finished; finish it first")
    check(
        (folder / PIPELINE).is_dir(),
        f"{folder} holds scores but no pipeline, which is needed; remove it to train the run again",
    )

    def put_together(aside: Path) -> None:
        shutil.copytree(folder / PIPELINE, aside)
        if scores["autoencoder"] is not None:
            shutil.copytree(autoencoder_of(comparison, scores["autoencoder"]), aside / "vae")

    target.parent.mkdir(parents=True, exist_ok=True)
    write_aside(target, put_together)
    return target


def first_run(comparison: Comparison, entry: str) -> Run:
    """The run of an entry whose images are shown and whose speed is measured."""
    return next(run for run in comparison.runs if run.entry == entry)


def scored_as(comparison: Comparison) -> dict:
    """What scores depend on besides the pipeline."""
    config = comparison.config
    entry = comparison.entries[config.dmmd]
    keys = {"num_images": config.num_images, "batch_size": config.batch_size, "extractors": comparison.extractors}
    keys |= {"training": comparison.training_data, "reference": config.reference}
    return keys | {"resolution": entry.data.resolution, "autoencoder": entry.autoencoder.name_or_path}


def scored_alike(comparison: Comparison, scored: dict | None) -> bool:
    """Whether scores were made as the comparison asks; keys that they do not name count as alike."""
    asked = scored_as(comparison)
    return bool(scored) and all(asked.get(name) == value for name, value in scored.items())


def holds_sets(comparison: Comparison, scores: dict | None, labels_and_sets: list[tuple[str, int, int]]) -> bool:
    """Whether finished scores are of these sets, by label, NFE and seed, and were made alike."""
    if scores is None or not scored_alike(comparison, scores["scored"]):
        return False
    return set(labels_and_sets) <= {(s["label"], s["nfe"], s["seed"]) for s in scores["sets"]}


def write_run(comparison: Comparison, run: Run, scores: dict, source: Path | None, grids: dict) -> None:
    """Leave what a finished run needs: its scores, the pipeline at `source` unless it was loaded, and its grids."""
    scores = {**scores, "autoencoder": None if source is None else keep_autoencoder(comparison, source / "vae")}

    def write(aside: Path) -> None:
        if source is not None:
            shutil.copytree(source, aside / PIPELINE, ignore=shutil.ignore_patterns("vae"))
            save_config(comparison.config_of(run, scores["num_steps"]), aside / "config.yaml")
        save_grids(grids, aside)

    write_finished(comparison.export_dir / run.name, scores, write)


def keep_autoencoder(comparison: Comparison, vae: Path) -> str | None:
    """Copy an autoencoder to where all runs find it, once, unless it is bundled; a hash of its weights, or None where
    there is none."""
    if not vae.is_dir():
        return None
    name = weights_hash(vae)
    folder = autoencoder_of(comparison, name)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_aside(folder, partial(shutil.copytree, vae))
    return name


def weights_hash(vae: Path) -> str:
    """A short hash of an autoencoder's weights."""
    return hashlib.sha256((vae / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()[:16]


def save_grids(grids: dict, folder: Path) -> None:
    """Write images as WebP, by file name."""
    for name, grid in grids.items():
        grid.save(folder / name, "WEBP", quality=80, method=6)


def disjoint_halves(count: int, num_images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of two disjoint random sets of at most `num_images` of `count` images, always the same."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0), device="cpu")
    size = min(num_images, count // 2)
    return order[:size], order[size : 2 * size]
