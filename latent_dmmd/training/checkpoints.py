"""Run folders and their checkpoints: written aside and renamed, complete or passed over, and free of code.

A checkpoint holds what Accelerate saves (weights as safetensors; optimiser and random states, which PyTorch reads with
`weights_only`), the averaged weights as safetensors, whose header holds the step, and `complete.json`, the size of
every file, written last.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from latent_dmmd.data.folders import printable
from latent_dmmd.training.differences import differing_keys
from latent_dmmd.utils.errors import ConfigError, one_line
from latent_dmmd.utils.files import is_empty, is_utf8, nearest_existing, probe, put_in_place

MANIFEST, AVERAGES = "complete.json", "averages.safetensors"


def check_run_folder(config: object, may_differ: tuple[str, ...] = ()) -> Path:
    """The run folder of a configuration, which need not be there; nothing is written.

    Args:
        config: With an `output_dir`.
        may_differ: Keys that may have changed since the run was started, besides those that never matter.

    Raises:
        ConfigError: If it holds a run of another configuration, or foreign files, or is a file, or is not UTF-8:
            nothing that is saved there could be loaded.
    """
    folder = Path(config.output_dir)
    if not is_utf8(folder):
        raise ConfigError(f"output_dir {printable(str(folder))} is not UTF-8; choose another --output_dir")
    saved = folder / "config.yaml"
    if saved.exists():
        harmless = (
            "sampling.",
            "training.checkpoint",
            "training.log",
            "data.num_workers",
            "data.cache_dir",
            *may_differ,
        )
        changed = {name: how for name, how in differing_keys(config, saved).items() if not name.startswith(harmless)}
        if changed:
            listed = ", ".join(f"{name} {how}" for name, how in changed.items())
            raise ConfigError(f"{folder} holds a run of another configuration: {listed}; {way_on(config, changed)}")
    elif folder.is_dir() and not is_empty(folder):
        raise ConfigError(f"{folder} is not empty and holds no run; choose another --output_dir")
    elif folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; choose another --output_dir")
    return folder


def prepare_run_folder(config: object, may_differ: tuple[str, ...] = ()) -> Path:
    """`check_run_folder`, and make the folder. Raises OSError if it cannot be made."""
    folder = check_run_folder(config, may_differ)
    there = nearest_writable(folder, "output_dir")
    try:
        probe(there)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a superuser has every permission, and /proc takes no file
        raise OSError(f"cannot write {folder}: {one_line(error)}; pass another output_dir") from error
    return folder


def nearest_writable(folder: Path, key: str) -> Path:
    """The nearest folder that is there, itself or above it. Raises OSError, with the key, if it cannot be written."""
    there = nearest_existing(folder)
    if not there.is_dir():
        what = "a file" if there.exists() else "a broken link"
        raise NotADirectoryError(f"cannot write {folder}: {there} is {what}; pass another {key}")
    if not os.access(there, os.W_OK | os.X_OK):
        read_only = os.statvfs(there).f_flag & os.ST_RDONLY if hasattr(os, "statvfs") else False
        why = "Read-only file system" if read_only else "no permission"
        raise PermissionError(f"cannot write {folder}: {why} at {there}; pass another {key}")
    return there


def way_on(config: object, changed: Iterable[str]) -> str:
    """What to do about a run folder of another configuration; its weights are offered where they fit."""
    weights, another = Path(config.output_dir) / "pipeline", "choose another --output_dir"
    network = ("feature_net.", "autoencoder.name_or_path", "data.resolution", "objective.name")
    fits = hasattr(config, "method") and config.method.is_whole_in_pipeline
    fits = fits and not any(name.startswith(network) for name in changed)
    if not fits or not (weights / "model_index.json").exists():
        return another
    return f"{another}, and --training.init_from {weights} to start from these weights"


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint holds every file that was written, at its size."""
    try:
        sizes = json.loads((checkpoint / MANIFEST).read_text())
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def step_of(checkpoint: Path) -> int | None:
    """The step in a checkpoint's name; None if there is none. `steps_done` reads it from the checkpoint."""
    step = checkpoint.name.removeprefix("checkpoint-")
    return int(step) if step.isdigit() else None


def steps_done(checkpoint: Path) -> int:
    """Steps after which a checkpoint was written, whatever its name: each of them updated the averages once.

    Raises ConfigError if it cannot be read.
    """
    try:
        with safe_open(checkpoint / AVERAGES, "pt") as file:
            return int(file.metadata()["num_updates"])
    except Exception as error:  # safetensors has types of its own
        raise unreadable(checkpoint, error) from error


def unreadable(checkpoint: Path, error: Exception) -> ConfigError:
    return ConfigError(f"cannot read {checkpoint}: {one_line(error)}; pass an older checkpoint folder")


def checkpoints_in(folder: Path) -> list[Path]:
    """Complete checkpoints under the names that training gives them, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if step_of(p) is not None and is_complete(p)]
    return sorted(found, key=step_of)


def pass_over_incomplete(accelerator: Accelerator, folder: Path) -> None:
    """Name the checkpoints that a run left unfinished, in the main process; what was never renamed is deleted."""
    if not accelerator.is_main_process:
        return
    names = [p.name for p in folder.glob("checkpoint-*") if step_of(p) is not None and not is_complete(p)]
    for aside in folder.glob(".checkpoint-*"):
        names.append(aside.name)
        shutil.rmtree(aside, ignore_errors=True)
    if names:
        accelerator.print(f"passing over {', '.join(sorted(names))}: not complete")


def checkpoint_to_resume(folder: Path, wanted: str | None, num_steps: int) -> Path | None:
    """The checkpoint to go on from, or None to start.

    Args:
        folder: The run folder.
        wanted: A checkpoint folder, also by its name in the run folder; the latest complete one if "latest" or None.
        num_steps: Steps of the run.

    Raises:
        ConfigError: If the one asked for is not there or not complete, or has more steps than the run.
    """
    if wanted in (None, "latest"):
        checkpoint = next(reversed(checkpoints_in(folder)), None)
        if checkpoint is None:
            return None
    else:
        checkpoint = next((p for p in (Path(wanted), folder / wanted) if p.is_dir()), None)
        if checkpoint is None:
            raise ConfigError(f"no checkpoint {wanted}; pass a checkpoint folder or 'latest'")
        if not is_complete(checkpoint):
            raise ConfigError(f"{checkpoint} is no checkpoint, or not complete; pass a checkpoint folder or 'latest'")
    done = steps_done(checkpoint)
    if done > num_steps:
        raise ConfigError(
            f"{checkpoint} has been trained longer, for {done} steps; raise training.num_steps={num_steps} or choose "
            "another --output_dir"
        )
    return checkpoint


@contextmanager
def writing(what: Path, folder: Path) -> Iterator[None]:
    """Context in which a run folder is written to. Raises OSError, in one line that names the last checkpoint."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have types of their own for it
        last = next(reversed(checkpoints_in(folder)), None)
        kept = f"the last checkpoint, {last.name}, is intact" if last else "there is no checkpoint yet"
        free = shutil.disk_usage(folder).free // 2**20
        raise OSError(f"cannot write {what}: {one_line(error)}; {free} MB free there; {kept}") from error


def save_checkpoint(
    accelerator: Accelerator, network: nn.Module, ema: EMAModel, folder: Path, step: int, limit: int
) -> None:
    """Write a checkpoint aside, rename it, then prune: there is always a complete one after the first.

    Checkpoints of more steps are deleted: training went on from an older one, and they are of the way that it left.

    Args:
        accelerator: Whose prepared objects are saved, on every rank.
        network: Whose parameters are averaged.
        ema: Their averages.
        folder: The run folder.
        step: Steps that are done.
        limit: Checkpoints that are kept.

    Raises:
        OSError: If it cannot be written.
    """
    final, aside = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}"
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
    accelerator.wait_for_everyone()
    with writing(final, folder):
        try:
            accelerator.save_state(aside)
            if accelerator.is_main_process:
                averages = {name: a.contiguous() for (name, _), a in zip(network.named_parameters(), ema.shadow_params)}
                save_file(averages, aside / AVERAGES, metadata={"num_updates": str(ema.optimization_step)})
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                sizes = {p.name: p.stat().st_size for p in sorted(aside.iterdir())}
                (aside / MANIFEST).write_text(json.dumps(sizes, indent=2))
                put_in_place(aside, final)
                saved = checkpoints_in(folder)
                for old in saved:
                    if step_of(old) > step:
                        discard(old)
                for old in [checkpoint for checkpoint in saved if step_of(checkpoint) <= step][:-limit]:
                    discard(old)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise


def load_checkpoint(accelerator: Accelerator, network: nn.Module, ema: EMAModel, checkpoint: Path) -> int:
    """Read what `save_checkpoint` wrote, running no code that it holds.

    Args:
        accelerator: Whose prepared objects are loaded, on every rank.
        network: Whose parameters are averaged.
        ema: Their averages.
        checkpoint: The checkpoint's folder.

    Returns:
        Steps that were done.

    Raises:
        ConfigError: If it cannot be read, or is of another network.
    """
    try:
        accelerator.load_state(checkpoint)
        averages = load_file(checkpoint / AVERAGES)
        for (name, _), average in zip(network.named_parameters(), ema.shadow_params):
            average.copy_(averages[name])
    except Exception as error:  # damaged files trip torch, pickle and safetensors over many types
        raise unreadable(checkpoint, error) from error
    ema.optimization_step = steps_done(checkpoint)
    return ema.optimization_step


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint; one half deleted no longer has its name."""
    if checkpoint.exists():
        aside = checkpoint.with_name(f".{checkpoint.name}.old")
        os.replace(checkpoint, aside)
        shutil.rmtree(aside)
