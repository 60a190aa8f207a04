"""What is compared: DMMD beside what a user would pick instead, every entry trained, sampled and scored alike.

An entry is a name and the keys of `Config` in which it differs from the others. A run is one training of an entry: an
entry of several training seeds has as many runs. `stages.py` does the work.
"""

import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple

import yaml

from latent_dmmd.data.autoencoder import bundled_for
from latent_dmmd.data.sources import load_images
from latent_dmmd.methods.base import method_class
from latent_dmmd.methods.witness_matching import WitnessMatchingConfig
from latent_dmmd.metrics.extractors import Extractor
from latent_dmmd.pipeline import read_index
from latent_dmmd.training.config import Config, check_seed, parse_config
from latent_dmmd.utils.errors import ConfigError, check
from latent_dmmd.utils.files import expand_home

GAUSSIAN, DECODE = "gaussian", "decode"  # what is always sampled, and always timed
MATCHED_FACTOR = 3  # an NFE of DMMD takes a forward and a backward pass, three of the baseline's
MATCHED_UP_TO = 30
MAX_TABLE_ROWS = 8


@dataclass
class CompareConfig:
    """Train, sample and score every entry, and write a report.

    Args:
        output_dir: The comparison's folder.
        entries: Name to keys of `scripts/train_latent.py`, nested as in its YAML files. The objective's `teacher` may
            be another entry.
        include: The entries to compare, of those above; all if null.
        only: Runs to finish, without a page, so that processes or machines share the work; of none, only seconds per
            step are measured. All runs and the page if null.
        trained: Runs to load instead of training them: name of the entry, or ENTRY-seed-S, to folder of a pipeline.
        common: Keys that all entries share; of `objective`, those that an entry's method has.
        data: The data set with a name that entries are trained on, in the latents of its bundled autoencoder, where
            `common` does not say otherwise.
        splits: Of `data`, the part to train on and the part that sets are scored against.
        minutes: Training time of every run that is not loaded, turned into steps by the measured seconds per step; or
        num_steps: Steps of every run that is not loaded.
        training_seeds: Entries to train several times: name to training seeds. Their runs are called ENTRY-seed-S.
        milestones: Shares of the training time at which the first run of an entry is sampled and scored as well.
        milestone_nfe: The NFE of these sets.
        costs: A JSON file of seconds per training step, `costs.json` of another comparison, instead of measuring them.
        speed: A JSON file of seconds per NFE, `speed.json` of another comparison, instead of measuring them.
        num_images: Images of each set that is scored.
        batch_size: Images generated at once, at most; the particles of the exact sampler interact within them.
        nfe: Numbers of function evaluations.
        seeds: Sampling seeds of each set.
        few: Entries, or ways of sampling such as `latent-dmmd exact`, of which there are sets at `few_nfe` alone.
        few_nfe: See `few`.
        one_seed_from: NFE from which on the first seed alone is used.
        dmmd: The entry in question.
        baseline: The entry it is held against; also sampled at three times the NFE, for equal time per image.
        pixel: The entry in question, on pixels.
        pixel_baseline: The baseline, on pixels.
        reference: Held-out images that sets are scored against; the second of `splits` if null.
        extractor: The network whose features are compared.
        second_extractor: A second opinion, on which nothing was tuned.
        export_dir: Where finished runs are kept, for other machines: `finished` in `output_dir` if null.
        report_dir: The folder of the page; `report` in `output_dir` if null.
        beside: Export folders of other comparisons that the page shows as well.
        table: Rows of the Markdown table, at most 8: what an entry is called in the scores, to NFE.
        rebuild: Whether the page is made of finished runs alone, without training and sampling.
    """

    output_dir: str = "runs/compare"
    entries: dict[str, dict] = field(default_factory=dict)
    include: list[str] | None = None
    only: list[str] | None = None
    trained: dict[str, str] = field(default_factory=dict)
    common: dict = field(default_factory=dict)
    data: Literal["elpv", "openmoji"] = "elpv"
    splits: list[str] = field(default_factory=lambda: ["train", "heldout"])
    minutes: float | None = None
    num_steps: int | None = None
    training_seeds: dict[str, list[int]] = field(default_factory=dict)
    milestones: list[float] = field(default_factory=list)
    milestone_nfe: int = 25
    costs: str | None = None
    speed: str | None = None
    num_images: int = 128
    batch_size: int = 128
    nfe: list[int] = field(default_factory=lambda: [5, 10, 25, 50, 100, 250])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    few: list[str] = field(default_factory=list)
    few_nfe: list[int] = field(default_factory=lambda: [10, 100])
    one_seed_from: int = 250
    dmmd: str = "latent-dmmd"
    baseline: str = "latent-flow-matching"
    pixel: str = "pixel-dmmd"
    pixel_baseline: str = "pixel-flow-matching"
    reference: str | None = None
    extractor: Extractor = "efficientnet-lite0"
    second_extractor: Extractor | None = None
    export_dir: str | None = None
    report_dir: str | None = None
    beside: list[str] = field(default_factory=list)
    table: dict[str, list[int]] = field(default_factory=dict)
    rebuild: bool = False

    def __post_init__(self) -> None:
        expand_home(self, "output_dir", "export_dir", "report_dir", "costs", "speed")
        self.check_numbers()
        self.check_names()
        self.keep_included()
        gone = [name for name in self.only or () if name not in [run.name for run in self.runs]]
        check(not gone, f"only: {', '.join(gone)} not among include: {', '.join(self.include or ())}")
        unknown = [name for name in (self.dmmd, self.baseline) if name not in self.entries]
        check(not unknown, f"{', '.join(unknown)} not among entries: {', '.join(self.entries)}")
        self.name_data()

    def check_numbers(self) -> None:
        """Raise ConfigError for numbers out of range."""
        check(bool(self.entries), "entries must name at least one; see configs/compare_elpv256.yaml")
        given = sum(value is not None for value in (self.minutes, self.num_steps))
        check(given == 1 or (self.rebuild and given == 0), "give either minutes or num_steps")
        for name in ("minutes", "num_steps", "milestone_nfe"):
            value = getattr(self, name)
            check(value is None or value > 0, f"{name} must be positive; got {value}")
        for name in ("num_images", "batch_size"):
            check(getattr(self, name) >= 4, f"{name} must be at least 4; got {getattr(self, name)}")
        for name in ("nfe", "few_nfe"):
            check(
                min(getattr(self, name), default=0) > 0, f"{name} must be positive numbers; got {getattr(self, name)}"
            )
        check(bool(self.seeds), "seeds must name at least one")
        check(all(0 < share < 1 for share in self.milestones), f"milestones must be in (0, 1); got {self.milestones}")
        check(
            self.only is None or not self.rebuild,
            "only finishes runs, rebuild shows finished ones; give one of them",
        )
        check(len(self.splits) == 2, f"splits must be two, such as [train, heldout]; got {self.splits}")
        rows = sum(len(numbers) for numbers in self.table.values())
        check(rows <= MAX_TABLE_ROWS, f"table must have at most {MAX_TABLE_ROWS} rows; got {rows}")
        check(self.second_extractor != self.extractor, f"second_extractor is extractor, {self.extractor}; name another")

    def check_names(self) -> None:
        """Raise ConfigError for names that cannot be right."""
        odd = [name for name in self.entries if not re.fullmatch(r"[\w.-]+", name)]
        check(not odd, f"names of entries are letters, digits, '-', '_' and '.'; got {', '.join(odd)}")
        check(GAUSSIAN not in self.entries, f"{GAUSSIAN} is always compared; choose another name for the entry")
        check(DECODE not in self.entries, f"{DECODE} is measured of every entry; choose another name for the entry")
        for name, seeds in self.training_seeds.items():
            check(0 < len(seeds) == len(set(seeds)), f"training_seeds.{name} must be different numbers; got {seeds}")
            for seed in seeds:
                check_seed(f"training_seeds.{name}", seed)
        in_table = (entry_of(label) for label in self.table if label != GAUSSIAN)
        named = (*map(entry_of, self.few), *in_table, *(self.include or ()), *self.training_seeds)
        unknown = [name for name in named if name not in self.entries]
        check(not unknown, f"{', '.join(unknown)} not among entries: {', '.join(self.entries)}")
        names = [run.name for run in self.runs]
        twice = [name for name in names if names.count(name) > 1]
        check(not twice, f"{', '.join(twice[:1])} is both an entry and a training seed of another; rename the entry")
        for key, given in (("trained", self.trained), ("only", self.only or ())):
            unknown = [name for name in given if name not in names]
            check(not unknown, f"{key}: {', '.join(unknown)} not among entries: {', '.join(names)}")

    def keep_included(self) -> None:
        """Leave out the entries that are not compared."""
        if self.include is None:
            return
        self.entries = {name: keys for name, keys in self.entries.items() if name in self.include}
        self.few = [name for name in self.few if entry_of(name) in self.include]
        self.training_seeds = {name: seeds for name, seeds in self.training_seeds.items() if name in self.include}
        names = [run.name for run in self.runs]
        self.trained = {name: folder for name, folder in self.trained.items() if name in names}

    def name_data(self) -> None:
        """Name the images and the autoencoder by `data` and `splits` where nothing else is said."""
        train, heldout = self.splits
        named = {"data": f"{self.data}:{train}", "autoencoder": bundled_for(self.data)}
        named = {key: {"name_or_path": name} for key, name in named.items()}
        self.common = merged(named, self.common)
        if self.reference is None:
            self.reference = f"{self.data}:{heldout}"

    @property
    def runs(self) -> list["Run"]:
        """The trainings of all entries, in their order."""
        runs = []
        for entry in self.entries:
            if entry in self.training_seeds:
                runs += [Run(f"{entry}-seed-{seed}", entry, seed) for seed in self.training_seeds[entry]]
            else:
                runs.append(Run(entry, entry, None))
        return runs


class Run(NamedTuple):
    """One training of an entry.

    Attributes:
        name: What it is called: as the entry, or ENTRY-seed-S.
        entry: The entry.
        seed: Its training seed; the entry's own if None.
    """

    name: str
    entry: str
    seed: int | None


class Sets(NamedTuple):
    """Sets of a run that are sampled in one way.

    Attributes:
        label: What the scores call them: the entry and the sampler.
        options: Arguments of the pipeline's call.
        files: (NFE, sampling seed) to file.
    """

    label: str
    options: dict
    files: dict[tuple[int, int], Path]


def entry_of(label: str) -> str:
    """The entry of a way of sampling, such as `latent-dmmd exact`."""
    return label.split(" ")[0]


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
        ValueError: If there is no pipeline where a run is to be loaded from.
    """

    def __init__(self, config: CompareConfig) -> None:
        self.config, self.folder = config, Path(config.output_dir)
        self.export_dir = Path(config.export_dir or self.folder / "finished")
        self.report_dir = Path(config.report_dir or self.folder / "report")
        # those that are learnt from come first
        self.runs = sorted(config.runs, key=lambda run: self.teacher(run.entry) is not None)
        self.configs = {run.name: self.parsed(run) for run in self.runs}
        self.entries = {run.entry: self.configs[run.name] for run in reversed(self.runs)}
        if self.entries[config.dmmd].autoencoder.name_or_path is None:
            raise ConfigError(f"dmmd={config.dmmd} is on pixels; name an entry with an autoencoder")
        known = [*self.entries, *(label for entry in self.entries for label in self.ways(entry))]
        unknown = [name for name in config.few if name not in known]
        check(not unknown, f"few: {', '.join(unknown)} not among {', '.join(known)}")
        unknown = [label for label in config.table if entry_of(label) in self.entries and label not in known]
        check(not unknown, f"table: {', '.join(unknown)} not among {', '.join(known)}")
        for folder in config.trained.values():
            read_index(folder)

    def config_of(self, run: Run, num_steps: int) -> Config:
        """The configuration of a run. A teacher that is an entry is named, not yet its folder."""
        config = self.configs[run.name]
        return replace(config, training=replace(config.training, num_steps=num_steps))

    def parsed(self, run: Run) -> Config:
        """The configuration of a run, but for its number of steps. Raises ConfigError if it cannot be right."""
        keys = merged(shared_keys(self.config.common, self.config.entries[run.entry]), self.config.entries[run.entry])
        # a constant learning rate: a larger budget goes on where a smaller one ended
        training = {"num_steps": 1, "learning_rate_schedule": "constant"}
        if run.seed is not None:
            training["seed"] = run.seed
        keys = merged(keys, {"output_dir": str(self.run_folder(run)), "training": training})
        try:
            return parse_config(Config, ["--config", yaml.safe_dump(keys)])
        except ConfigError as error:
            raise ConfigError(f"entries.{run.entry}: {error}") from error

    def teacher(self, entry: str) -> Run | None:
        """The run that an entry learns from, the first of the entry that it names."""
        name = (self.config.entries[entry].get("objective") or {}).get("teacher")
        return next((run for run in self.config.runs if run.entry == name), None)

    @property
    def to_train(self) -> list[Run]:
        """The runs that are not loaded."""
        return [run for run in self.runs if run.name not in self.config.trained]

    def run_folder(self, run: Run) -> Path:
        """The folder that training writes."""
        return self.folder / "runs" / run.name

    def num_steps(self, costs: dict[str, dict]) -> dict[str, int]:
        """Training steps of every entry with runs to train, by the costs of one."""
        names = dict.fromkeys(run.entry for run in self.to_train)
        if self.config.num_steps is not None:
            return dict.fromkeys(names, self.config.num_steps)
        return {name: max(1, round(60 * self.config.minutes / costs[name]["seconds"])) for name in names}

    def ways(self, entry: str) -> dict[str, dict]:
        """The ways in which an entry is sampled: what each is called, and its arguments of the pipeline's call."""
        samplers = list(self.entries[entry].method.samplers.items())
        samplers = samplers[:1] if entry in self.config.few else samplers
        return {f"{entry} {sampler}".strip(): options for sampler, options in samplers}

    def nfe_and_seeds(self, entry: str, label: str) -> list[tuple[int, int]]:
        """NFE and sampling seed of every set of a run of an entry that is sampled in one way."""
        config = self.config
        if self.entries[entry].method.one_step:
            numbers = [1]
        elif entry in config.few or label in config.few:
            numbers = list(config.few_nfe)
        else:
            numbers = list(config.nfe)
            if entry == config.baseline:
                numbers += [MATCHED_FACTOR * nfe for nfe in config.nfe if nfe <= MATCHED_UP_TO]
        return [
            (nfe, seed)
            for nfe in sorted(set(numbers))
            for seed in (config.seeds if nfe < config.one_seed_from else config.seeds[:1])
        ]

    def sets(self, run: Run, state: str, milestone: bool = False) -> list[Sets]:
        """The sets of a run in a state, such as "100-steps"; at a milestone one of each way that has more than few."""
        found = []
        one_step = self.entries[run.entry].method.one_step
        for label, options in self.ways(run.entry).items():
            numbers = self.nfe_and_seeds(run.entry, label)
            if milestone:
                if label in self.config.few and label != run.entry:
                    continue
                numbers = [(1 if one_step else self.config.milestone_nfe, numbers[0][1])]
            folder = self.folder / "samples" / (run.name + label.removeprefix(run.entry).replace(" ", "-")) / state
            files = {(nfe, seed): folder / f"nfe-{nfe}-seed-{seed}.safetensors" for nfe, seed in numbers}
            found.append(Sets(label, options, files))
        return found

    def gaussian_sets(self) -> Sets:
        """The sets of the fitted Gaussian, which has no NFE."""
        folder = self.folder / "samples" / GAUSSIAN
        return Sets(GAUSSIAN, {}, {(0, seed): folder / f"seed-{seed}.safetensors" for seed in self.config.seeds})

    @property
    def extractors(self) -> list[str]:
        """The networks whose features are compared, the main one first."""
        return [name for name in (self.config.extractor, self.config.second_extractor) if name is not None]

    def load_images(self, name: str):
        """A set of images as the entry in question reads it."""
        data = self.entries[self.config.dmmd].data
        return load_images(name, data.resolution, data.image_column)

    @property
    def training_data(self) -> str:
        """The data that the entry in question is trained on."""
        return self.entries[self.config.dmmd].data.name_or_path
