"""DMMD beside what a user would pick instead: every entry trained alike, sampled alike, scored alike.

An entry is a name and the keys of `Config` in which it differs from the others. The stages, each of which leaves files
in the comparison's folder and is skipped where these are there, so that a killed comparison goes on where it was:

    costs.json              seconds of a training step of each entry, measured in turns: minutes become steps by it
    entries/NAME.yaml       the configuration of each entry, which `scripts/train_latent.py --config` takes, too
    runs/NAME/              its run folder
    samples/…               features of the generated pictures, the first pictures, and the time they took
    real.safetensors        features of held-out and training pictures and of reconstructions
    speed.json              time a picture of the entries, measured in turns
    report/                 results.json, the plots, and index.html (`report.py`)

Training time is steps times measured seconds a step: other work on the machine leaves its mark on the wall clock.
"""

import json
import multiprocessing
import os
import platform
import re
import resource
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache as cached
from functools import cached_property, partial
from pathlib import Path

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Subset
from torch_fidelity import FeatureExtractorBase

from latent_dmmd.baselines import GaussianFit
from latent_dmmd.cache import LatentCache, PixelCache
from latent_dmmd.complexity import measure
from latent_dmmd.config import ONE_STEP, Config, parse_config, save_config
from latent_dmmd.data import load_pictures, write_aside
from latent_dmmd.evaluation import (
    EXTRACTORS,
    CheckedPictures,
    Extractor,
    Reconstructions,
    extract_features,
    frechet_distance,
    load_extractor,
    memorised_share,
    nearest,
    score_features,
)
from latent_dmmd.latents import load_autoencoder, standardise, to_uint8
from latent_dmmd.pipeline import LatentPipeline, load_pipeline, read_index
from latent_dmmd.training import (
    Trainer,
    load_particles,
    probe_latents,
    train,
)
from latent_dmmd.utils.errors import ConfigError, check
from latent_dmmd.utils.process import default_device, own_accelerator

GAUSSIAN = "gaussian"
NUM_SHOWN = 32
MATCHED_FACTOR = 3  # an NFE of DMMD takes a forward and a backward pass, three of the baseline's
MATCHED_UP_TO = 30
CALIBRATION_STEPS = 4  # as many as lie between two refreshes of running means


@dataclass
class CompareConfig:
    """Train, sample and score every entry, and write a report.

    Args:
        output_dir: The comparison's folder.
        entries: Name to keys of `scripts/train_latent.py`, nested as in its YAML files.
        include: The entries to compare, of those above; all if null.
        trained: Entries to load instead of training them: name to folder of a pipeline.
        common: Keys that all entries share.
        minutes: Training time of each other entry, turned into steps by the measured seconds a step; or
        num_steps: steps of each other entry.
        num_images: Pictures of each set that is scored.
        nfe: Numbers of function evaluations.
        seeds: Sampling seeds of each set.
        few: Entries that are sampled at `few_nfe` only.
        few_nfe: See `few`.
        one_seed_from: NFE from which on the first seed alone is used.
        dmmd: The entry in question.
        baseline: The entry it is held against; also sampled at three times the NFE, for equal time a picture.
        pixel: The entry on pixels.
        reference: Held-out pictures that sets are scored against.
        extractor: The network whose features are compared.
    """

    output_dir: str = "runs/compare"
    entries: dict[str, dict] = field(default_factory=dict)
    include: list[str] | None = None
    trained: dict[str, str] = field(default_factory=dict)
    common: dict = field(default_factory=dict)
    minutes: float | None = None
    num_steps: int | None = None
    num_images: int = 128
    nfe: list[int] = field(default_factory=lambda: [5, 10, 25, 50, 100, 250])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    few: list[str] = field(default_factory=list)
    few_nfe: list[int] = field(default_factory=lambda: [10, 100])
    one_seed_from: int = 250
    dmmd: str = "latent-dmmd"
    baseline: str = "latent-flow-matching"
    pixel: str = "pixel-dmmd"
    reference: str = "elpv:heldout"
    extractor: Extractor = "efficientnet-lite0"

    def __post_init__(self) -> None:
        check(bool(self.entries), "entries must name at least one; see configs/compare_elpv256.yaml")
        check((self.minutes is None) != (self.num_steps is None), "give either minutes or num_steps")
        for name in ("minutes", "num_steps"):
            value = getattr(self, name)
            check(value is None or value > 0, f"{name} must be positive; got {value}")
        check(self.num_images >= 4, f"num_images must be at least 4; got {self.num_images}")
        check(bool(self.nfe) and min(self.nfe) > 0, f"nfe must be positive numbers; got {self.nfe}")
        check(bool(self.seeds), "seeds must name at least one")
        odd = [name for name in self.entries if not re.fullmatch(r"[\w.-]+", name)]
        check(not odd, f"names of entries are letters, digits, '-', '_' and '.'; got {', '.join(odd)}")
        check(GAUSSIAN not in self.entries, f"{GAUSSIAN} is always compared; choose another name for the entry")
        named = (*self.few, *(self.include or ()), *self.trained)
        unknown = [name for name in named if name not in self.entries]
        check(not unknown, f"{', '.join(unknown)} not among entries: {', '.join(self.entries)}")
        if self.include is not None:
            self.entries = {name: keys for name, keys in self.entries.items() if name in self.include}
            self.few = [name for name in self.few if name in self.include]
            self.trained = {name: folder for name, folder in self.trained.items() if name in self.include}
        unknown = [name for name in (self.dmmd, self.baseline) if name not in self.entries]
        check(not unknown, f"{', '.join(unknown)} not among entries: {', '.join(self.entries)}")


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, lambda aside: aside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n"))


def merged(first: dict, second: dict) -> dict:
    """Nested keys of both, the second's where both have one."""
    result = dict(first)
    for key, value in second.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


class Comparison:
    """A comparison and its folder.

    Args:
        config: What to compare.

    Raises:
        ConfigError: If the configuration of an entry cannot be right.
        ValueError: If there is no pipeline where an entry is to be loaded from.
    """

    def __init__(self, config: CompareConfig) -> None:
        self.config, self.folder = config, Path(config.output_dir)
        self.entries = {name: self.entry(name, num_steps=1) for name in config.entries}
        if self.entries[config.dmmd].autoencoder.name_or_path is None:
            raise ConfigError(f"dmmd={config.dmmd} is on pixels; name an entry with an autoencoder")
        for folder in config.trained.values():
            read_index(folder)

    def entry(self, name: str, num_steps: int) -> Config:
        """The configuration of an entry."""
        keys = merged(self.config.common, self.config.entries[name])
        # a constant learning rate: a larger budget goes on where a smaller one ended
        training = {"num_steps": num_steps, "learning_rate_schedule": "constant"}
        keys = merged(keys, {"output_dir": str(self.folder / "runs" / name), "training": training})
        try:
            return parse_config(Config, ["--config", yaml.safe_dump(keys)])
        except ConfigError as error:
            raise ConfigError(f"entries.{name}: {error}") from error

    def pipeline_folder(self, name: str) -> Path:
        """The folder of an entry's trained pipeline."""
        return Path(self.config.trained.get(name, self.folder / "runs" / name / "pipeline"))

    # training

    @property
    def to_train(self) -> list[str]:
        """The entries that are not loaded."""
        return [name for name in self.config.entries if name not in self.config.trained]

    def costs(self) -> dict[str, dict]:
        """Seconds and parameters of a training step of every entry to train, measured in turns, once."""
        path = self.folder / "costs.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        if not set(self.to_train) <= set(known):
            # all of them again: only figures of one measurement are compared
            known = in_a_process(step_costs, {name: self.entries[name] for name in self.to_train})
            write_json(path, known)
        return known

    def num_steps(self) -> dict[str, int]:
        """Training steps of every entry to train."""
        costs, config = self.costs(), self.config
        if config.num_steps is not None:
            return {name: config.num_steps for name in self.to_train}
        return {name: max(1, round(60 * config.minutes / costs[name]["seconds"])) for name in self.to_train}

    def train(self) -> None:
        """Train every entry to train to its number of steps, each in a process of its own."""
        for name, steps in self.num_steps().items():
            config = self.entry(name, steps)
            record = self.folder / "runs" / name / "trained.json"
            if record.exists() and json.loads(record.read_text())["num_steps"] == steps:
                continue
            print(f"{name}: training, {steps} steps")
            (self.folder / "entries").mkdir(parents=True, exist_ok=True)
            save_config(config, self.folder / "entries" / f"{name}.yaml")
            peak_mb = in_a_process(train_and_measure, config)
            write_json(record, {"num_steps": steps, "peak_mb": peak_mb})

    # sampling

    def labels(self, name: str) -> dict[str, dict]:
        """What the ways are called in which an entry is sampled, and the arguments of the pipeline's call for each."""
        if self.entries[name].objective.name not in ("witness-matching", "dmmd"):
            return {name: {}}
        samplers = ("exact",) if name in self.config.few else ("exact", "approximate")
        return {f"{name} {sampler}": {"sampler": sampler} for sampler in samplers}

    def sets(self, name: str) -> list[tuple[int, int]]:
        """NFE and seed of every set of an entry."""
        config = self.config
        if self.entries[name].objective.name in ONE_STEP:
            numbers = [1]
        elif name in config.few:
            numbers = list(config.few_nfe)
        else:
            numbers = list(config.nfe)
            if name == config.baseline:
                numbers += [MATCHED_FACTOR * nfe for nfe in config.nfe if nfe <= MATCHED_UP_TO]
        return [
            (nfe, seed)
            for nfe in sorted(set(numbers))
            for seed in (config.seeds if nfe < config.one_seed_from else config.seeds[:1])
        ]

    def samples(self) -> dict[str, dict[tuple[int, int], Path]]:
        """The generated sets: label to (NFE, seed) to the file of its features; made where they are missing."""
        config, files, steps = self.config, {}, self.num_steps()
        for name in config.entries:
            pipe = cached(lambda name=name: load_pipeline(self.pipeline_folder(name)))
            state = f"{steps[name]}-steps" if name in steps else "trained"
            for label, options in self.labels(name).items():
                folder = self.folder / "samples" / label.replace(" ", "-") / state
                files[label] = {key: folder / "nfe-{}-seed-{}.safetensors".format(*key) for key in self.sets(name)}
                for (nfe, seed), path in files[label].items():
                    how = {"num_inference_steps": nfe, **options}
                    draw = partial(generate, pipe, how)
                    self.make_set(path, f"{label}, {nfe} NFE", seed, draw, config.trained.get(name))
        folder = self.folder / "samples" / GAUSSIAN
        files[GAUSSIAN] = {(0, seed): folder / f"seed-{seed}.safetensors" for seed in config.seeds}
        fit = cached(self.fit_gaussian)
        for (_, seed), path in files[GAUSSIAN].items():
            self.make_set(path, GAUSSIAN, seed, lambda n, generator: fit()(n, generator))
        return files

    def fit_gaussian(self) -> Callable[[int, torch.Generator], Tensor]:
        """A sampler of pictures from the Gaussian fitted to the training latents."""
        config = self.entries[self.config.dmmd]
        pipe = load_pipeline(self.pipeline_folder(self.config.dmmd))
        pictures = load_pictures(config.data.name_or_path, config.data.resolution, config.data.image_column)
        cache = load_particles(pipe.vae, pictures, config)
        fit = GaussianFit(standardise(cache.mean[:, 0], cache.channel_mean, cache.channel_std))
        return lambda n, generator: pipe.decode(fit.draw(n, generator).to(pipe.device), "pt")

    def make_set(
        self,
        path: Path,
        label: str,
        seed: int,
        draw: Callable[[int, torch.Generator], Tensor],
        pipeline: str | None = None,
    ) -> None:
        """Features of generated pictures, and the first pictures, in a file.

        Nothing is done if the file holds as many pictures, of the same loaded pipeline, seen by the same network.
        """
        made_for = {"num_images": str(self.config.num_images), "extractor": self.config.extractor}
        if pipeline is not None:
            made_for["pipeline"] = pipeline
        if holds(path, made_for):
            return
        print(f"{label}, seed {seed}: {self.config.num_images} pictures")
        images = draw(self.config.num_images, torch.Generator().manual_seed(seed))
        images_uint8 = to_uint8(images.cpu() * 2 - 1)
        features, _ = extract_features(CheckedPictures(images_uint8, label), self.extractor)
        tensors = {"features": features, "images": images_uint8[:NUM_SHOWN].contiguous()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_aside(path, partial(save_file, tensors, metadata=made_for))

    def real(self) -> dict[str, Tensor]:
        """Features of real pictures: `training`, `reference`, and these through the autoencoder (`reconstructions`),
        and as many training pictures through it as are generated (`reconstructed_training`)."""
        path, config = self.folder / "real.safetensors", self.entries[self.config.dmmd]
        made_for = {name: str(getattr(self.config, name)) for name in ("num_images", "extractor", "reference")}
        made_for |= {"training": config.data.name_or_path, "autoencoder": config.autoencoder.name_or_path}
        if not holds(path, made_for):
            training, reference = (
                CheckedPictures(load_pictures(name, config.data.resolution), name)
                for name in (config.data.name_or_path, self.config.reference)
            )
            order = torch.randperm(len(training), generator=torch.Generator().manual_seed(0), device="cpu").tolist()
            some = Subset(training, order[: self.config.num_images])
            vae = load_autoencoder(config.autoencoder.name_or_path, default_device())
            sets = {
                "training": training,
                "reference": reference,
                "reconstructions": Reconstructions(vae, reference),
                "reconstructed_training": Reconstructions(vae, some),
            }
            tensors = {}
            for name, pictures in sets.items():
                print(f"features of real pictures: {name}, {len(pictures)}")
                tensors[name] = extract_features(pictures, self.extractor)[0]
            write_aside(path, partial(save_file, tensors, metadata=made_for))
        return load_file(path)

    def speed(self) -> dict[str, dict]:
        """Seconds of one NFE a picture, without decoding, for every label, and of decoding one; measured in turns."""
        path = self.folder / "speed.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        ways = {label: (name, options) for name in self.config.entries for label, options in self.labels(name).items()}
        if not {*ways, "decode"} <= set(known):
            # all of them again: only figures of one measurement are compared
            folders = {name: self.pipeline_folder(name) for name in self.config.entries}
            known = in_a_process(sampling_costs, folders, ways, self.config.dmmd)
            write_json(path, known)
        return known

    def seconds_per_picture(self, label: str, nfe: int, speed: dict[str, dict]) -> float:
        """What a picture takes by these speeds, decoding included."""
        on_pixels = [name for name, entry in self.entries.items() if entry.autoencoder.name_or_path is None]
        decoding = 0 if any(label in self.labels(name) for name in on_pixels) else speed["decode"]["seconds"]
        return decoding + (nfe * speed[label]["seconds"] if label != GAUSSIAN else 0)

    @cached_property
    def extractor(self) -> FeatureExtractorBase:
        """The network whose features are compared, loaded when it is needed first."""
        return load_extractor(self.config.extractor)

    # results

    def results(self) -> dict:
        """Everything that the report shows, but for the pictures."""
        config, costs, steps = self.config, self.costs(), self.num_steps()
        files, real, speed = self.samples(), self.real(), self.speed()
        entries = {}
        for name in self.to_train:
            record = json.loads((self.folder / "runs" / name / "trained.json").read_text())
            entries[name] = {
                "num_parameters": costs[name]["num_parameters"],
                "num_steps": steps[name],
                "seconds_per_step": costs[name]["seconds"],
                "training_minutes": steps[name] * costs[name]["seconds"] / 60,
                "peak_mb": record["peak_mb"],
                "keys": merged(config.common, config.entries[name]),
            }
        rows = []
        for label, sets in files.items():
            for nfe in sorted({nfe for nfe, _ in sets}):
                paths = [path for (n, _), path in sets.items() if n == nfe]
                seconds = self.seconds_per_picture(label, nfe, speed)
                scores = self.scores(paths, real)
                rows.append({"label": label, "nfe": nfe, "seconds_per_picture": seconds, **scores})
        order = torch.randperm(len(real["training"]), generator=torch.Generator().manual_seed(0), device="cpu")
        n, m = config.num_images, len(real["reference"])
        half = len(order) // 2
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
        return result | {"goals": goals(result)}

    def scores(self, paths: list[Path], real: dict[str, Tensor]) -> dict:
        """Scores of the sets of one entry and NFE: a list over seeds of each."""
        scores = []
        for path in paths:
            features = load_file(path)["features"]
            score = score_features(features, real["reference"])
            memorised = memorised_share(features, real["training"], real["reference"])
            scores.append(score | {"memorised_share": memorised})
        return {name: [score[name] for score in scores] for name in scores[0]}

    def pictures(self, label: str, nfe: int) -> Tensor:
        """The first pictures of a set, of the first seed."""
        return load_file(self.samples()[label][nfe, self.config.seeds[0]])["images"]

    def held_out(self, count: int) -> Tensor:
        """Some of the reference pictures, uint8 with shape (count, 3, R, R)."""
        data = self.entries[self.config.dmmd].data
        return load_pictures(self.config.reference, data.resolution, data.image_column).examples(count, seed=0)

    def neighbours(self, label: str, nfe: int, count: int = 8) -> tuple[Tensor, Tensor]:
        """Of the first pictures of a set, those nearest to a training picture, and that picture."""
        tensors, training = load_file(self.samples()[label][nfe, self.config.seeds[0]]), self.real()["training"]
        distances, index = nearest(tensors["features"][: len(tensors["images"])], training)
        chosen = distances.argsort()[:count]
        config = self.entries[self.config.dmmd]
        pictures = load_pictures(config.data.name_or_path, config.data.resolution, config.data.image_column)
        return tensors["images"][chosen], torch.stack([pictures[i] for i in index[chosen].tolist()])


def holds(path: Path, made_for: dict[str, str]) -> bool:
    """Whether a file of tensors is there and was made for these settings."""
    if not path.exists():
        return False
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    return all(metadata.get(name) == value for name, value in made_for.items())


def mean_of(result: dict, label: str, nfe: int, name: str = "frechet_distance") -> float | None:
    """The mean over seeds of a score; None if there is no such row."""
    for row in result["rows"]:
        if row["label"] == label and row["nfe"] == nfe:
            return statistics.fmean(row[name])
    return None


def goals(result: dict) -> list[dict]:
    """The ratios that the comparison is about: what each is, its value, and what was aimed at."""
    settings, reconstruction = result["settings"], result["reconstruction_distance"]
    exact, stored = (f"{settings['dmmd']} {sampler}" for sampler in ("exact", "approximate"))
    pixel = f"{settings['pixel']} exact"
    found = []

    def goal(text: str, value: Callable[[], float], aim: float, sign: str = "≤") -> None:
        try:
            figure = value()
            met = {"≤": figure <= aim, "<": figure < aim, "≥": figure >= aim}[sign]
        except (TypeError, KeyError):  # one of the sets is not there, or was not timed
            return
        found.append({"what": text, "value": figure, "aim": f"{sign} {aim:g}", "met": met})

    def above(label: str, nfe: int) -> float:
        return mean_of(result, label, nfe) - reconstruction

    baseline = settings["baseline"]
    for label in (exact, stored):
        for nfe, aim, sign in ((100, 1.0, "≤"), (10, 0.8, "<")):
            text = f"{label} ÷ {baseline}, distance above the reconstruction's, {nfe} NFE"
            goal(text, lambda: above(label, nfe) / above(baseline, nfe), aim, sign)  # noqa: B023  called at once
    for nfe in sorted({row["nfe"] for row in result["rows"] if 0 < row["nfe"] <= MATCHED_UP_TO}):
        text = f"{stored} at {nfe} NFE ÷ {baseline} at {MATCHED_FACTOR * nfe} NFE, distance"
        goal(text, lambda: mean_of(result, stored, nfe) / mean_of(result, baseline, MATCHED_FACTOR * nfe), 1.0)  # noqa: B023
    text = f"{pixel} ÷ {exact}, distance, 100 NFE"
    goal(text, lambda: mean_of(result, pixel, 100) / mean_of(result, exact, 100), 2, "≥")
    goal(f"{exact}, 100 NFE ÷ reconstruction, distance", lambda: mean_of(result, exact, 100) / reconstruction, 2)
    seconds = {name: cost["seconds"] for name, cost in result["speed"].items()}
    for label, aim in ((exact, 3.2), (stored, 3.0)):
        text = f"{label} ÷ {baseline}, time of one NFE a picture"
        goal(text, lambda: seconds[label] / seconds[baseline], aim)  # noqa: B023
    for label in (exact, stored):
        text = f"{label}, 100 NFE, share of memorised pictures"
        goal(text, lambda: mean_of(result, label, 100, "memorised_share"), 0.02)  # noqa: B023
    return found


def generate(pipe: Callable[[], LatentPipeline], how: dict, n: int, generator: torch.Generator) -> Tensor:
    """Pictures in [0, 1], all particles in one chunk: the exact witness needs no second forward then."""
    return pipe()(n, generator=generator, chunk_size=None, output_type="pt", **how).images


def sampling_costs(
    folders: dict[str, Path], ways: dict[str, tuple[str, dict]], dmmd: str, nfe: int = 5, num_images: int = 32
) -> dict[str, dict]:
    """Seconds and peak memory of one NFE a picture for every way, an entry and options; and of decoding one."""
    pipes = {name: load_pipeline(folder) for name, folder in folders.items()}
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    how = {"num_inference_steps": nfe, "output_type": "latent", "chunk_size": None}
    z = pipes[dmmd].initial_particles(num_images, torch.Generator().manual_seed(0), None)
    tasks = {label: partial(pipes[name], num_images, **how, **options) for label, (name, options) in ways.items()}
    tasks["decode"] = partial(pipes[dmmd].decode, z, "pt")
    costs = measure(tasks, pipes[dmmd].device, repeats=7)
    each = {label: num_images * (1 if label == "decode" else nfe) for label in tasks}
    return {label: {"seconds": cost.seconds / each[label], "peak_mb": cost.peak_mb} for label, cost in costs.items()}


def machine() -> dict:
    """What the figures were measured on."""
    gpu = torch.cuda.get_device_name() if default_device().type == "cuda" else None
    return {"gpu": gpu, "threads": torch.get_num_threads(), "torch": torch.__version__, "system": platform.system()}


def in_a_process(function, *args):
    """The function's value from a process of its own, whose memory and threads leave nothing behind."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=end_with_parent, initargs=(os.getpid(),)) as pool:
        return pool.submit(function, *args).result()


def end_with_parent(parent: int) -> None:
    """Send this process SIGTERM when its parent is gone: a killed comparison leaves nothing running."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def train_and_measure(config: Config) -> float:
    """Train; the peak memory in MB: of the GPU, or of this process."""
    train(config)
    if default_device().type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**10 if sys.platform != "darwin" else 2**20)


def step_costs(configs: dict[str, Config], repeats: int = 5) -> dict[str, dict]:
    """Seconds and parameters of a training step of each configuration, on particles that are noise, taking turns.

    Raises ConfigError if the configurations have several precisions, which one process cannot have at a time.
    """
    with ExitStack() as stack:
        tasks, sizes = {}, {}
        for name, config in configs.items():
            accelerator = stack.enter_context(own_accelerator(config.training.mixed_precision))
            side, generator = config.data.resolution, torch.Generator().manual_seed(0)
            if config.autoencoder.name_or_path:
                vae = load_autoencoder(config.autoencoder.name_or_path, accelerator.device)
                z = torch.randn(64, 1, *probe_latents(vae, side).shape[1:], generator=generator, device="cpu")
                cache = LatentCache(((z, None),), z.new_zeros(z.shape[2]), z.new_ones(z.shape[2]))
            else:
                shape = (64, 3, side, side)
                pictures = torch.randint(256, shape, dtype=torch.uint8, generator=generator, device="cpu")
                zeros, ones = torch.zeros(3, device="cpu"), torch.ones(3, device="cpu")
                cache = PixelCache(pictures, config.data.horizontal_flip, zeros, ones)
            trainer = Trainer(config, tuple(cache.draw(1, generator).shape[1:]), accelerator)
            sizes[name] = sum(p.numel() for p in trainer.network.parameters())

            def task(trainer: Trainer = trainer, cache: LatentCache | PixelCache = cache) -> None:
                for step in range(CALIBRATION_STEPS):
                    trainer.step(step, cache)

            tasks[name] = task
        costs = measure(tasks, accelerator.device, repeats)
    return {
        name: {"seconds": costs[name].seconds / CALIBRATION_STEPS, "num_parameters": sizes[name]} for name in configs
    }
