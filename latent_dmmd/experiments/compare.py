"""What is compared: DMMD beside what a user would pick instead, every entry trained, sampled and scored alike.

An entry is a name and the keys of `Config` in which it differs from the others. `stages.py` does the work.
"""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from latent_dmmd.data.sources import load_images
from latent_dmmd.methods.base import method_class
from latent_dmmd.methods.witness_matching import WitnessMatchingConfig
from latent_dmmd.metrics.extractors import (
    Extractor,
)
from latent_dmmd.pipeline import read_index
from latent_dmmd.training.config import Config, parse_config
from latent_dmmd.utils.errors import ConfigError, check
from latent_dmmd.utils.files import expand_home

GAUSSIAN = "gaussian"
MATCHED_FACTOR = 3  # an NFE of DMMD takes a forward and a backward pass, three of the baseline's
MATCHED_UP_TO = 30


@dataclass
class CompareConfig:
    """Train, sample and score every entry, and write a report.

    Args:
        output_dir: The comparison's folder.
        entries: Name to keys of `scripts/train_latent.py`, nested as in its YAML files.
        include: The entries to compare, of those above; all if null.
        trained: Entries to load instead of training them: name to folder of a pipeline.
        common: Keys that all entries share; of `objective`, those that an entry's method has.
        minutes: Training time of every entry that is not loaded, turned into steps by the measured seconds per step; or
        num_steps: Steps of every entry that is not loaded.
        num_images: Images of each set that is scored.
        nfe: Numbers of function evaluations.
        seeds: Sampling seeds of each set.
        few: Entries that are sampled at `few_nfe` only.
        few_nfe: See `few`.
        one_seed_from: NFE from which on the first seed alone is used.
        dmmd: The entry in question.
        baseline: The entry it is held against; also sampled at three times the NFE, for equal time per image.
        pixel: The entry on pixels.
        reference: Held-out images that sets are scored against.
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
        expand_home(self, "output_dir")
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


def merged(first: dict, second: dict) -> dict:
    """Nested keys of both, the second's where both have one."""
    result = dict(first)
    for key, value in second.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def shared_keys(common: dict, entry: dict) -> dict:
    """The keys that an entry shares with the others: of `objective`, those that its method has."""
    shared, own = dict(common.get("objective") or {}), entry.get("objective") or {}
    method = method_class(own.get("name", shared.get("name", WitnessMatchingConfig.name)))
    known = {f.name for f in fields(method.config_class)}
    return {**common, "objective": {key: value for key, value in shared.items() if key in known}}


class Comparison:
    """What is compared, and where its files lie; nothing is trained, generated or read here.

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
        keys = merged(shared_keys(self.config.common, self.config.entries[name]), self.config.entries[name])
        # a constant learning rate: a larger budget goes on where a smaller one ended
        training = {"num_steps": num_steps, "learning_rate_schedule": "constant"}
        keys = merged(keys, {"output_dir": str(self.folder / "runs" / name), "training": training})
        try:
            return parse_config(Config, ["--config", yaml.safe_dump(keys)])
        except ConfigError as error:
            raise ConfigError(f"entries.{name}: {error}") from error

    @property
    def to_train(self) -> list[str]:
        """The entries that are not loaded."""
        return [name for name in self.config.entries if name not in self.config.trained]

    def pipeline_folder(self, name: str) -> Path | str:
        """The folder of an entry's trained pipeline, or the bundled one's name."""
        return self.config.trained.get(name, self.folder / "runs" / name / "pipeline")

    def num_steps(self, costs: dict[str, dict]) -> dict[str, int]:
        """Training steps of every entry to train, by the costs of one."""
        if self.config.num_steps is not None:
            return {name: self.config.num_steps for name in self.to_train}
        return {name: max(1, round(60 * self.config.minutes / costs[name]["seconds"])) for name in self.to_train}

    def ways(self, name: str) -> dict[str, dict]:
        """The ways in which an entry is sampled: what each is called, and its arguments of the pipeline's call."""
        samplers = list(self.entries[name].method.samplers.items())
        samplers = samplers[:1] if name in self.config.few else samplers
        return {f"{name} {sampler}".strip(): options for sampler, options in samplers}

    def sets(self, name: str) -> list[tuple[int, int]]:
        """NFE and seed of every set of an entry."""
        config = self.config
        if self.entries[name].method.one_step:
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

    def set_files(self, steps: dict[str, int]) -> dict[str, dict[tuple[int, int], Path]]:
        """The files of the generated sets: label to (NFE, seed) to path."""
        files = {}
        for name in self.config.entries:
            state = f"{steps[name]}-steps" if name in steps else "trained"
            for label in self.ways(name):
                folder = self.folder / "samples" / label.replace(" ", "-") / state
                files[label] = {key: folder / "nfe-{}-seed-{}.safetensors".format(*key) for key in self.sets(name)}
        folder = self.folder / "samples" / GAUSSIAN
        files[GAUSSIAN] = {(0, seed): folder / f"seed-{seed}.safetensors" for seed in self.config.seeds}
        return files

    def load_images(self, name: str):
        """A set of images as the entry in question reads it."""
        data = self.entries[self.config.dmmd].data
        return load_images(name, data.resolution, data.image_column)

    @property
    def training_data(self) -> str:
        """The data that the entry in question is trained on."""
        return self.entries[self.config.dmmd].data.name_or_path
