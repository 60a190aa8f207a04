"""The photographs of solar cells that `elpv-dataset` installs, their parts and their classes."""

from pathlib import Path

from latent_dmmd.utils.errors import DataError


def elpv_files(split: str) -> list[Path]:
    """The photographs of `elpv-dataset` (Buerhop-Lutz et al., 2018), in the order of their numbers.

    Args:
        split: "all"; "heldout", every tenth photograph, on which nothing is chosen; "train", the others; or the two
            parts of "train": "validation", a ninth of it, to choose settings on, and "fit", the rest.

    Raises:
        DataError: If there is no such split, or the photographs are not installed.
    """
    parts = {"heldout": {0}, "validation": {5}}
    parts |= {"all": set(range(10)), "train": set(range(1, 10)), "fit": set(range(1, 10)) - parts["validation"]}
    if split not in parts:
        raise DataError(f"elpv has no split {split!r}; use {', '.join(f'elpv:{name}' for name in parts)}")
    try:
        import elpv_dataset
    except ImportError as error:
        raise DataError('the ELPV photographs are not installed: pip install "latent-dmmd[demo]"') from error
    paths = sorted((Path(elpv_dataset.__file__).parent / "data" / "images").glob("*.png"))
    return [p for i, p in enumerate(paths) if i % 10 in parts[split]]


def elpv_classes(paths: list[Path]) -> list[str]:
    """Classes of photographs of `elpv-dataset`: the kind of silicon, mono or poly, and whether experts gave a defect a
    probability above one half, as in "mono defective" and "poly intact"."""
    lines = (paths[0].parents[1] / "labels.csv").read_text().split("\n")
    known = {file: (float(probability), kind) for file, probability, kind in map(str.split, filter(None, lines))}
    found = [known[f"images/{p.name}"] for p in paths]
    return [f"{kind} {'defective' if probability > 0.5 else 'intact'}" for probability, kind in found]
