"""Files and folders that a reader sees whole or not at all."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from latent_dmmd.utils.errors import one_line

PROBE = "probe"  # the name of a file that is written and removed at once


def expand_home(config: object, *names: str) -> None:
    """Replace a leading `~` in the given attributes, which a shell leaves alone behind "=" and in YAML."""
    for name in names:
        value = getattr(config, name)
        if value is not None:
            setattr(config, name, os.path.expanduser(value))


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/latent_dmmd`, or `~/.cache/latent_dmmd`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latent_dmmd"


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file or a folder under another name, then rename it: a reader sees all of it or nothing.

    Args:
        path: The file or folder, which may exist.
        write: Writes it at the path it is given.

    Raises:
        OSError: If it cannot be written; the message names the file.
    """
    aside = aside_of(path)
    try:
        write(aside)
        put_in_place(aside, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {path}: {one_line(error)}") from error
    finally:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)


def changed_keys(path: Path, expected: dict) -> list[str]:
    """The keys of `expected` that have another value in a JSON file; all of them if it holds no JSON object."""
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    return [key for key in expected if not isinstance(found, dict) or found.get(key) != expected[key]]


def aside_of(path: Path) -> Path:
    """The name that a file or a folder has in this process until it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def is_aside(name: str) -> bool:
    """Whether a file's name is one that `aside_of` gives: it is being written, or its process was killed meanwhile."""
    return name.startswith(".") and name.endswith(".partial")


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but files that other processes are writing, or were killed while they wrote."""
    return all(is_aside(path.name) for path in folder.iterdir())


def put_in_place(aside: Path, path: Path) -> None:
    """Rename a file or a folder; a folder that has the name makes way, and half deleted it no longer has it."""
    if path.is_dir():
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
        try:
            os.replace(aside, path)
        except OSError:
            os.replace(old, path)
            raise
        shutil.rmtree(old)
    else:
        os.replace(aside, path)


def is_utf8(path: str | Path) -> bool:
    """Whether a path is UTF-8. One that is not holds files that safetensors writes and cannot read."""
    try:
        return bool(str(path).encode())
    except UnicodeEncodeError:
        return False


def nearest_existing(path: str | Path) -> Path:
    """What is there of a path: itself, or the nearest above it. A broken link is there, and is no folder."""
    path = Path(path)
    return next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))


def probe(folder: Path, name: str = PROBE) -> None:
    """Write and remove a file in a folder. Raises OSError, as the system does, if that cannot be done.

    A superuser may write anywhere, but not on every file system: permissions alone do not tell.
    """
    file = aside_of(folder / name)
    file.touch()
    file.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Raise OSError unless a file can be written there, in folders that are made: asked before the work."""
    path = Path(path)
    if path.is_dir():
        raise OSError(f"cannot write {path}: it is a folder; name a file in it")
    if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
        raise OSError(f"cannot write {path}: it is read-only or no plain file; name another file")
    check_folder(path.parent, path.name)


def check_files(folder: str | Path, *names: str) -> None:
    """Raise OSError unless files of these names can be written into a folder that is made."""
    for name in names:
        check_writable(Path(folder) / name)


def check_folder(folder: str | Path, name: str = PROBE) -> None:
    """Raise OSError unless a file of that name can be written into a folder, which may be missing; none is left."""
    folder = Path(folder)
    nearest = nearest_existing(folder)
    if not nearest.is_dir():
        raise OSError(f"cannot write into {folder}: {nearest} is no folder")
    try:
        probe(nearest, name)
    except OSError as error:
        raise OSError(f"cannot write into {folder}: {one_line(error)}") from error


def write_json(path: Path, value: object) -> None:
    """Write plain values, indented, into a folder that is made. Raises OSError if they cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, lambda aside: aside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n"))
