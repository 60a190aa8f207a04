"""What a folder is and what can be done with it, from JSON, YAML and headers alone: no weights and no code are read."""

import json
import math
from pathlib import Path
from shlex import join, quote

import yaml
from safetensors import SafetensorError, safe_open

from latent_dmmd.data.autoencoder import AUTOENCODERS, BUNDLED_AUTOENCODERS
from latent_dmmd.data.folders import find_images
from latent_dmmd.data.shards import counted_images, shard_path
from latent_dmmd.latent_pipeline import bundled_pipelines, pipeline_folder
from latent_dmmd.methods.base import METHODS
from latent_dmmd.pipeline import PIPELINES, read_index
from latent_dmmd.schedule import SamplingDefaults
from latent_dmmd.training.checkpoints import AVERAGES, MANIFEST, checkpoints_in, is_complete, step_of, steps_done
from latent_dmmd.training.first_look import shared_words
from latent_dmmd.utils.errors import ConfigError

Facts = dict[str, object]  # lines by name; empty ones are left out


def describe_folder(path: str | Path) -> str:
    """A few lines on a folder of this package, or on a bundled pipeline or autoencoder, by name.

    Raises ValueError if there is no such folder.
    """
    folder = BUNDLED_AUTOENCODERS.get(str(path)) or Path(pipeline_folder(path))
    if not folder.is_dir():
        bundled = ", ".join([*bundled_pipelines(), *BUNDLED_AUTOENCODERS])
        raise ValueError(f"no folder {path}; give one, or a bundled name: {bundled}")
    for describe in (pipeline, checkpoint, run, cache, model, samples, runs, images):
        found = describe(folder)
        if found is not None:
            title, facts = found
            lines = [f"  {name + ':':14}{value}" for name, value in facts.items() if value not in (None, "")]
            return "\n".join([f"{path}: {title}", *lines])
    return (
        f"{path}: nothing that is known here; looked for a pipeline (model_index.json), a checkpoint ({AVERAGES}), a "
        "run or runs (config.yaml), a latent cache (manifest.json), an autoencoder (config.json), samples and images"
    )


def pipeline(folder: Path) -> tuple[str, Facts] | None:
    """A saved or bundled pipeline."""
    if not read_json(folder / "model_index.json"):
        return None
    index = read_index(folder)
    name = index.get("_class_name")
    if name not in PIPELINES:
        vae = folder / "vae" if (folder / "vae").is_dir() else None
        return f"a pipeline of another library, {name}", {"autoencoder": vae, "size": size_of(folder)}
    net = folder / ("feature_net" if "feature_net" in index else "network")
    config, stored = read_json(net / "config.json"), read_json(folder / "mean_embeddings" / "config.json")
    side, vae = config.get("sample_size", "?"), read_json(folder / "vae" / "config.json").get("_class_name")
    space = f"latents of {vae}, {num_parameters(folder / 'vae')}" if vae else "pixels"
    facts = {
        "network": f"{config.get('_class_name')}, {num_parameters(net)}",
        "particles": f"{config.get('in_channels', '?')} × {side} × {side}, {space}",
        "noise levels": stored.get("num_noise_levels"),
        "samples by": sampling_of(folder, index),
        "classes": ", ".join(index.get("class_names") or []),
        "size": size_of(folder),
        "next": sample(short(folder)),
    }
    return f"a pipeline, {name}", facts


def sampling_of(folder: Path, index: dict) -> str:
    """How a pipeline generates where a call does not say."""
    if "feature_net" in index:
        own = vars(SamplingDefaults()) | group(index, "sampling")
        return f"{own['sampler']}, {own['num_noise_levels']} levels × {own['steps_per_level']} steps"
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json").get("_class_name")
    return f"{scheduler}, {index.get('num_inference_steps', 50)} steps"


def checkpoint(folder: Path) -> tuple[str, Facts] | None:
    """A checkpoint of a run, or a copy of one."""
    if not any((folder / name).exists() for name in (AVERAGES, MANIFEST, "optimizer.bin")):
        return None
    run_folder = folder.parent if (folder.parent / "config.yaml").exists() else None
    whole = is_complete(folder)
    resume = resuming(run_folder, str(folder)) if whole and run_folder else None
    facts = {"step": step_in(folder), "run": run_folder, "size": size_of(folder), "next": resume}
    return f"a checkpoint, {'complete' if whole else 'not complete: it cannot be resumed'}", facts


def run(folder: Path) -> tuple[str, Facts] | None:
    """The run folder of a training."""
    if not (folder / "config.yaml").exists():
        return None
    config = read_yaml(folder / "config.yaml")
    if is_autoencoder_run(config):
        return autoencoder_run(folder, config)
    if "objective" not in config:
        return "a folder, with a config.yaml that is no run's", {"size": size_of(folder)}
    data, name = group(config, "data"), group(config, "objective").get("name")
    wanted = group(config, "training").get("num_steps", "?")
    complete = checkpoints_in(folder)
    partial = [p.name for p in folder.glob("checkpoint-*") if step_of(p) is not None and p not in complete]
    steps = step_in(complete[-1]) if complete else 0
    saved = (folder / "pipeline" / "model_index.json").exists()
    facts = {
        "data": f"{data.get('name_or_path')}, {data.get('resolution')} pixels",
        "autoencoder": group(config, "autoencoder").get("name_or_path") or "none: on pixels",
        "steps": f"{steps} of {wanted}",
        "checkpoints": ", ".join(p.name for p in complete) or "none that is complete",
        "incomplete": ", ".join(sorted(partial)),
        "pipeline": folder / "pipeline" if saved else "not yet: it is written after the last step",
        "size": size_of(folder),
        "next": sample(str(folder / "pipeline")) if saved and steps == wanted else f"{resuming(folder)}   (resumes)",
    }
    return f"a run, {METHODS[name].title if name in METHODS else 'an unknown method'} ({name})", facts


def is_autoencoder_run(config: dict) -> bool:
    return "latent_noise" in config and "objective" not in config


def autoencoder_run(folder: Path, config: dict) -> tuple[str, Facts]:
    """The run folder of the training of an autoencoder."""
    data = {"name_or_path": "elpv:train", "resolution": 256} | group(config, "data")
    complete, saved, wanted = checkpoints_in(folder), folder / "autoencoder", config.get("num_steps", "?")
    steps = step_in(complete[-1]) if complete else 0
    whole = (saved / "config.json").exists()
    words = shared_words(group(config, "data"))
    words += ["--autoencoder.name_or_path", str(saved), "--output_dir", "runs/NAME"]
    facts = {
        "data": f"{data['name_or_path']}, {data['resolution']} pixels",
        "steps": f"{steps} of {wanted}",
        "PSNR": last_psnr(folder / "metrics.jsonl"),
        "checkpoints": ", ".join(p.name for p in complete) or "none that is complete",
        "autoencoder": saved if whole else "not yet: it is written after the last step",
        "size": size_of(folder),
        "next": f"latent-dmmd train {join(words)}" if whole and steps == wanted else f"{resuming(folder)}   (resumes)",
    }
    return "a run, the training of an autoencoder", facts


def last_psnr(metrics: Path) -> str | None:
    """The PSNR on validation images that was measured last; None if there is none."""
    try:
        lines = [json.loads(line) for line in metrics.read_text().splitlines() if '"psnr"' in line]
        return f"{lines[-1]['psnr']:.2f} dB on validation images, at step {lines[-1]['step']}"
    except (OSError, ValueError, LookupError, TypeError):
        return None


def cache(folder: Path) -> tuple[str, Facts] | None:
    """A cache of encoded images, or of decoded ones, from which an autoencoder is trained."""
    manifest = read_json(folder / "manifest.json")
    if "autoencoder" not in manifest:
        return None
    count, size = counted_images(folder), manifest.get("shard_size") or 1
    shards = sorted(folder.glob("moments-*.safetensors"))
    whole = count is not None and all(shard_path(folder, start).exists() for start in range(0, count, size))
    encoded = sum(next(iter(shapes(path).values()), [0])[0] for path in shards)
    skipped = [name for path in shards for name in skipped_in(path)]
    weights = manifest["autoencoder"]
    facts = {
        "images": f"{encoded} {'encoded' if weights else 'decoded'}, {manifest.get('resolution')} pixels"
        + (", mirrored as well" if manifest.get("horizontal_flip") else ""),
        "skipped": f"{len(skipped)}: {', '.join(skipped[:3])}" if skipped else None,
        "autoencoder": f"weights {weights}" if weights else None,
        "data": f"fingerprint {manifest.get('data')}",
        "size": size_of(folder),
    }
    what, state = "a latent cache" if weights else "a cache of images", "complete" if whole else "not complete"
    return f"{what}, {state}" + (": the same command goes on" if not whole else ""), facts


def model(folder: Path) -> tuple[str, Facts] | None:
    """A saved diffusers model; autoencoders can be trained with."""
    config = read_json(folder / "config.json")
    name = config.get("_class_name")
    if name is None:
        return None
    facts = {"weights": num_parameters(folder), "channels": config.get("latent_channels"), "size": size_of(folder)}
    if name not in AUTOENCODERS:
        return f"a model, {name}, part of a pipeline or of another library", facts
    known_as = next((name for name, at in BUNDLED_AUTOENCODERS.items() if at == folder), quote(str(folder)))
    next_command = f"latent-dmmd train --autoencoder.name_or_path {known_as} --output_dir runs/NAME"
    return f"an autoencoder, {name}", {**facts, "next": next_command}


def samples(folder: Path) -> tuple[str, Facts] | None:
    """Generated images and their grid."""
    if not (folder / "grid.png").exists() or not (folder / "images").is_dir():
        return None
    return "generated images", {"images": count_images(folder / "images"), "grid": folder / "grid.png"}


def runs(folder: Path) -> tuple[str, Facts] | None:
    """A folder of run folders."""
    names = sorted(path.parent.name for path in folder.glob("*/config.yaml"))
    return (f"a folder of {len(names)} runs", {"runs": ", ".join(names)}) if names else None


def images(folder: Path) -> tuple[str, Facts] | None:
    """A folder of images, as training reads them."""
    count = count_images(folder)
    next_command = f"latent-dmmd train --data.name_or_path {quote(str(folder))} --output_dir runs/NAME --dry_run"
    return ("a folder of images", {"images": count, "next": next_command}) if count else None


def resuming(run_folder: Path, checkpoint: str = "latest") -> str:
    """The command that resumes a run; its checkpoint is named, since the saved configuration may name another.

    An autoencoder's training always goes on at the latest.
    """
    config, folder = quote(str(run_folder / "config.yaml")), quote(str(run_folder))
    if is_autoencoder_run(read_yaml(run_folder / "config.yaml")):
        return f"latent-dmmd train-autoencoder --config {config} --output_dir {folder}"
    return f"latent-dmmd train --config {config} --output_dir {folder} --resume_from_checkpoint {quote(checkpoint)}"


def sample(pipeline: str) -> str:
    """The command that samples a pipeline."""
    return f"latent-dmmd sample --pipeline {quote(pipeline)} --num_images 64 --output_dir samples"


def short(folder: Path) -> str:
    """A bundled pipeline by its name; any other by its folder."""
    bundled = folder.name in bundled_pipelines() and str(folder) == str(pipeline_folder(folder.name))
    return folder.name if bundled else str(folder)


def group(config: dict, name: str) -> dict:
    """The keys of a group; none if it holds none."""
    value = config.get(name)
    return value if isinstance(value, dict) else {}


def step_in(checkpoint: Path) -> int | str:
    try:
        return steps_done(checkpoint)
    except ConfigError:
        return "not readable"


def count_images(folder: Path) -> int:
    return len(find_images(str(folder)).paths)


def shapes(path: Path) -> dict[str, list[int]]:
    """Shapes of the tensors in a safetensors file; none if it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return {}


def skipped_in(shard: Path) -> list[str]:
    """Names of the images that a shard of a cache leaves out; none if it cannot be read."""
    try:
        with safe_open(shard, "pt") as file:
            return json.loads((file.metadata() or {}).get("skipped", "[]"))
    except (OSError, ValueError, SafetensorError):
        return []


def num_parameters(folder: Path) -> str:
    """The number of weights in the safetensors files of a model."""
    files = list(folder.glob("*.safetensors"))
    count = sum(math.prod(shape) for path in files for shape in shapes(path).values())
    return f"{count:,} parameters" if count else "no weights that can be read"


def size_of(folder: Path) -> str:
    """Size of all files below a folder."""
    return f"{sum(p.stat().st_size for p in folder.rglob('*') if p.is_file()) / 2**20:,.1f} MB"


def read_json(path: Path) -> dict:
    """What a JSON file holds; nothing if it is missing or damaged."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_yaml(path: Path) -> dict:
    """What a YAML file holds; nothing if it is missing or damaged."""
    try:
        value = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}
