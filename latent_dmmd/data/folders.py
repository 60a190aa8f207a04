"""Which files of a folder or a zip archive are images, which classes they have, and what is passed over."""

import os
import re
import zipfile
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from PIL import Image

from latent_dmmd.utils.errors import DataError, one_line

# what Pillow reads and people keep images in; not its documents, films and drawings
FORMATS = {"AVIF", "BMP", "DIB", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP"}
SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation", "heldout"}
HIDDEN = {"thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found"}
# what this library writes, and the files that show it
OWN_FOLDERS = {
    "run folder": {"config.yaml", "metrics.jsonl"},
    "pipeline": {"model_index.json"},
    "latent cache": {"manifest.json", "num_pictures.json"},
    "report": {"results.json", "index.html"},
}
OWN_FILES = {
    "samples.png": "metrics.jsonl",
    "losses.png": "metrics.jsonl",
    "grid.png": "images",
    "strip.png": "film.webp",
    "film.webp": "strip.png",
    "diagnosis.png": "diagnosis.json",
    "complexity.png": "complexity.json",
    "toy2d.png": "toy2d.json",
    "inpaint.webp": "edits.json",
    "upscale.webp": "edits.json",
}
# names in a folder, and what each is: FOLDER, FILE, LINK to a file, or why it is passed over
FOLDER, FILE, LINK = "folder", "file", "link"
Listing = Callable[[str], dict[str, str]]


@cache
def image_suffixes() -> frozenset[str]:
    """Suffixes in lower case of the images that this installation of Pillow reads."""
    Image.init()
    readable = FORMATS & Image.SAVE.keys()  # formats whose library is missing are registered, but not for saving
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in readable)


def printable(path: str) -> str:
    """A path as one line that any terminal and file takes: other bytes and control characters are escaped."""
    if path.isascii() and path.isprintable():
        return path
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda match: repr(match[0])[1:-1], text)


@dataclass
class Found:
    """What a folder or an archive holds.

    Attributes:
        root: The folder or archive.
        paths: The images, in the order of their names.
        passed_over: Why other files and folders are left out, and how many.
    """

    root: str
    paths: list[str] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)

    def folders(self) -> list[str]:
        """The folder of each image, relative to the root, which is ""."""
        return [os.path.dirname(path)[len(self.root) :].strip(os.sep) for path in self.paths]


def find_images(root: str, listing: Listing | None = None) -> Found:
    """All images below a folder, or in an archive by its listing. Links are followed; a file reached twice counts once.

    Raises:
        DataError: If a folder cannot be read, or if it holds several splits, which nobody wants mixed.
    """
    listing, found, linked = listing or on_disk, Found(root), False
    reached, folders = {os.path.realpath(root)}, deque([root])
    while folders:
        folder = folders.popleft()
        names = listing(folder)
        own = [what for what, marks in OWN_FOLDERS.items() if marks <= names.keys()]
        if own and folder != root:
            found.passed_over[own[0]] += 1
            continue
        for name, kind in names.items():
            path = os.path.join(folder, name)
            reason = why_left_out(name, kind, names)
            if reason is None and kind == FOLDER:
                real = os.path.realpath(path)
                reason = "reached twice" if real in reached else None
                if reason is None:
                    reached.add(real)
                    folders.append(path)
            elif reason is None:
                found.paths.append(path)
                linked |= kind == LINK
            if reason is not None:
                found.passed_over[reason] += 1
    if linked:
        keep_once(found)
    found.paths.sort()
    refuse_several_splits(found)
    return found


def keep_once(found: Found) -> None:
    """Leave out images that are reached twice, by links rather than in the place they have."""
    first = {}
    for path in sorted(found.paths, key=lambda p: (os.path.islink(p), p)):
        first.setdefault(os.path.realpath(path), path)
    found.passed_over["reached twice"] += len(found.paths) - len(first)
    found.paths = list(first.values())


def why_left_out(name: str, kind: str, names: dict[str, str]) -> str | None:
    """Why an entry of a folder is passed over; None for images and folders."""
    if name.startswith(".") or name.lower() in HIDDEN:
        return "hidden"
    if kind == FOLDER:
        return None
    if kind not in (FILE, LINK):
        return kind
    if OWN_FILES.get(name) in names:
        return "plot"
    suffix = os.path.splitext(name)[1].lower()
    if suffix in image_suffixes():
        return None
    return suffix if re.fullmatch(r"\.\w{1,12}", suffix) else "without a suffix"


def on_disk(folder: str) -> dict[str, str]:
    """Listing of a folder, links last, so that what has a place of its own keeps it. Raises DataError if there is no
    access."""

    def kind(entry: os.DirEntry) -> str:
        if entry.is_symlink():  # an entry raises for a link to itself
            return FOLDER if os.path.isdir(entry.path) else LINK if os.path.isfile(entry.path) else "broken link"
        return FOLDER if entry.is_dir() else FILE if entry.is_file() else "special file"

    try:
        with os.scandir(folder) as entries:
            return {e.name: kind(e) for e in sorted(entries, key=lambda e: (e.is_symlink(), e.name))}
    except OSError as error:
        raise DataError(f"cannot read the folder {printable(folder)}: {error.strerror}") from error


def refuse_several_splits(found: Found) -> None:
    """Raise DataError if a folder holds several splits: images to train on and to test with would be mixed."""
    splits = defaultdict(set)
    for folder in set(found.folders()):
        parts = folder.split(os.sep)
        for depth, name in enumerate(parts):
            if name.lower() in SPLITS:
                splits[os.path.join(found.root, *parts[:depth])].add(name)
    for parent, names in sorted(splits.items()):
        if len(names) > 1:
            choice = os.path.join(parent, min(names, key=lambda name: (not name.lower().startswith("train"), name)))
            if os.path.isfile(found.root):
                choice = f"{found.root}:{os.path.relpath(choice, found.root)}"
            listed = printable(", ".join(sorted(names)))
            raise DataError(f"{printable(parent)} holds the splits {listed}: give {printable(choice)}")


def classes_by_folder(found: Found) -> list[str] | None:
    """The class of each image: the folder below the root that it lies in; None if some lie in the root.

    The only split, and the only folder of an archive, stand for the root if all images are in folders below them.
    """
    folders = found.folders()
    while all(os.sep in folder for folder in folders) and len({folder.split(os.sep)[0] for folder in folders}) == 1:
        only, _ = folders[0].split(os.sep, 1)
        if only.lower() not in SPLITS and not os.path.isfile(found.root):
            break
        folders = [folder.split(os.sep, 1)[1] for folder in folders]
    classes = {folder: printable(folder.split(os.sep)[0]) for folder in set(folders)}
    return [classes[folder] for folder in folders] if all(folders) else None


class ZipArchive:
    """The images in a zip archive, read without unpacking it; it can be sent to other processes.

    Args:
        path: The archive.

    Raises:
        DataError: If it is no zip archive.
    """

    def __init__(self, path: str) -> None:
        self.path, self.opened = path, None
        self.members: dict[str, zipfile.ZipInfo] = {}
        self.folders: dict[str, dict[str, str]] = {path: {}}
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
        except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
            raise DataError(f"cannot read {printable(path)}: {one_line(error)}") from error
        for member in members:
            *parents, name = [part for part in member.filename.split("/") if part] or [""]
            folder = path
            for parent in parents:
                self.folders.setdefault(folder, {})[parent] = FOLDER
                folder = os.path.join(folder, parent)
            self.folders.setdefault(folder, {})[name] = FOLDER if member.is_dir() else FILE
            self.members[os.path.join(folder, name)] = member

    def listing(self, folder: str) -> dict[str, str]:
        return self.folders.get(folder, {})

    def read(self, path: str) -> bytes:
        """The bytes of an image. Raises DataError if they are damaged or encrypted."""
        try:
            if self.opened is None or self.opened[0] != os.getpid():  # processes must not share a position in the file
                self.opened = os.getpid(), zipfile.ZipFile(self.path)
            return self.opened[1].read(self.members[path])
        except Exception as error:  # zipfile raises what zlib and others raise
            raise DataError(f"cannot read {printable(path)}: {one_line(error)}") from error

    def __getstate__(self) -> dict:
        return {**self.__dict__, "opened": None}
