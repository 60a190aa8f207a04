"""Folders of numbered images: one call fills a folder, so that the images of two calls never mix."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from latent_dmmd.utils.errors import one_line
from latent_dmmd.utils.files import check_folder, is_aside, write_json

MANIFEST = ".latent_dmmd.json"  # the files that a call wrote
ASIDE = ".latent_dmmd.partial"  # where they are until all are whole; what is left of a killed call makes way


class OutputFolder:
    """A folder that a call fills when its work is done. It must be empty, or missing: then it is made.

    Args:
        folder: The folder.
        overwrite: Whether it may hold what an earlier call wrote, and nothing else. `fill` replaces it.

    Raises:
        OSError: If it holds files that may not be replaced, or cannot be written.
    """

    def __init__(self, folder: str | Path, overwrite: bool = False) -> None:
        self.folder = Path(folder)
        check_folder(self.folder)
        self.earlier = self.files()
        if self.earlier and not overwrite:
            raise OSError(
                f"{self.folder} already holds {self.earlier[0]}; name another --output_dir, or pass --overwrite to "
                "replace what an earlier call wrote"
            )
        foreign = [name for name in self.earlier if name not in self.written()]
        if foreign:
            raise OSError(f"{self.folder} holds {foreign[0]}, which no earlier call wrote; name another --output_dir")

    def files(self) -> list[str]:
        """All files in it but their list and those of processes that write or were killed, and links to folders."""
        found = []
        for parent, folders, names in os.walk(self.folder):
            if ASIDE in folders:
                folders.remove(ASIDE)
            names = [name for name in names if not is_aside(name)]
            links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
            found += [Path(parent, name).relative_to(self.folder).as_posix() for name in (*names, *links)]
        return sorted(name for name in found if name != MANIFEST)

    def written(self) -> set[str]:
        """The files that an earlier call wrote."""
        try:
            return set(json.loads((self.folder / MANIFEST).read_text())["files"])
        except (OSError, ValueError, KeyError, TypeError):
            return set()

    def fill(self, write: Callable[[Path], object]) -> None:
        """Let `write` fill another folder, then move all of it here. Raises OSError if that cannot be done."""
        if self.files() != self.earlier:
            raise OSError(f"{self.folder} was written by another call meanwhile; name another --output_dir")
        aside = self.folder / ASIDE
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            write(aside)
            new = [path.relative_to(aside).as_posix() for path in aside.rglob("*") if not path.is_dir()]
            self.clear()
            write_json(self.folder / MANIFEST, {"files": sorted(new)})
            for entry in aside.iterdir():
                os.replace(entry, self.folder / entry.name)
        except OSError as error:
            raise OSError(f"cannot write into {self.folder}: {one_line(error)}") from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def clear(self) -> None:
        """Remove what an earlier call wrote, and folders without files."""
        for name in self.earlier:
            (self.folder / name).unlink()
        for parent, _, _ in os.walk(self.folder, topdown=False):
            if Path(parent) != self.folder and not os.listdir(parent):
                os.rmdir(parent)
