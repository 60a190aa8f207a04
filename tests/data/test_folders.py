"""Which files of folders and archives are images, their classes, and what is passed over."""

import os
import zipfile

import pytest
import torch
from conftest import BLUE, RED, assert_color, refusal, solid
from PIL import Image

from latent_dmmd.data import folders
from latent_dmmd.data.folders import image_suffixes
from latent_dmmd.data.particles import cache_latents
from latent_dmmd.data.sources import load_images
from latent_dmmd.training.config import Config, parse_config
from latent_dmmd.training.publishing import model_card


def plant(root, *names):
    """Files below a folder: images by their suffix, links as "name -> target", otherwise empty."""
    for name in names:
        name, _, target = name.partition(" -> ")
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if target:
            path.symlink_to(target)
        elif path.suffix.lower() in (".png", ".webp"):
            solid("RGB", RED).save(path)
        else:
            path.write_bytes(b"")
    return root


def found_in(root):
    """Names of the images below the root, and what was passed over."""
    source = load_images(str(root), 8)
    return [name.removeprefix(f"{root}/") for name in source.names], dict(source.passed_over)


# suffixes


@pytest.mark.parametrize("name", ["a.avif", "a.jfif", "a.jpe", "a.JPG", "a.ppm", "a.pgm", "a.jp2", "a.tga", "a.dib"])
def test_images_of_every_suffix_that_pillow_reads(tmp_path, name):
    suffix = (tmp_path / name).suffix.lower()
    if suffix not in image_suffixes():
        pytest.skip(f"this Pillow reads no {suffix}")
    image = solid("L" if suffix == ".pgm" else "RGB", 77 if suffix == ".pgm" else RED, (16, 16))
    image.save(tmp_path / name)
    assert_color(load_images(str(tmp_path), 16)[0], (77, 77, 77) if suffix == ".pgm" else RED, 3)


def test_suffixes_are_those_of_images_that_this_pillow_reads(monkeypatch):
    assert {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm"} <= image_suffixes()
    assert not {".pdf", ".eps", ".mpg", ".wmf", ".h5", ".fits", ".svg"} & image_suffixes()
    # Pillow without libavif registers the suffix nevertheless
    monkeypatch.setattr(Image, "SAVE", {name: save for name, save in Image.SAVE.items() if name != "AVIF"})
    image_suffixes.cache_clear()
    assert ".avif" not in image_suffixes() and ".png" in image_suffixes()
    image_suffixes.cache_clear()


# what is passed over

RUN = ["config.yaml", "metrics.jsonl", "samples.png", "losses.png", "pipeline/model_index.json", "pipeline/x.png"]
PASSED_OVER = {
    "hidden": (
        ["._a.png", ".DS_Store", "Thumbs.db", ".git/a.png", "__MACOSX/a.png", ".ipynb_checkpoints/a.png"],
        {"hidden": 6},
    ),
    "of other systems": (["@eaDir/a.png", ".Trash-1000/a.png", "b/desktop.ini", "b/.a.png.1.partial"], {"hidden": 4}),
    "other kinds": (
        ["a.svg", "b.npy", "c.txt", "d.TXT", "e.mp4", "f.heic", "image", "metadata.csv", "g.pdf", "h. no suffix"],
        {".svg": 1, ".npy": 1, ".txt": 2, ".mp4": 1, ".heic": 1, "without a suffix": 2, ".csv": 1, ".pdf": 1},
    ),
    "broken links": (["a.png -> nowhere.png", "b.png -> b.png", "c -> nowhere"], {"broken link": 3}),
    "run folder": ([f"runs/mine/{name}" for name in RUN], {"run folder": 1}),
    "the root as a run folder": (RUN, {"plot": 2, "pipeline": 1, ".yaml": 1, ".jsonl": 1}),
    "what sampling writes": (["grid.png", "images/a.png -> ../zz.png"], {"plot": 1, "reached twice": 1}),
    "film": (["film/strip.png", "film/film.webp"], {"plot": 2}),
    "diagnosis": (["diagnosis.png", "diagnosis.json"], {"plot": 1, ".json": 1}),
    "latent cache": (["cache/manifest.json", "cache/num_pictures.json", "cache/a.png"], {"latent cache": 1}),
    "report": (["report/results.json", "report/index.html", "report/kid.png"], {"report": 1}),
}


@pytest.mark.parametrize("names, passed_over", PASSED_OVER.values(), ids=PASSED_OVER.keys())
def test_what_is_no_data_is_passed_over_and_counted(tmp_path, names, passed_over):
    plant(tmp_path, "zz.png", *names)
    assert found_in(tmp_path) == (["zz.png"], passed_over)


def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(plant(tmp_path, "a.png") / "pipe.png")
    assert found_in(tmp_path) == (["a.png"], {"special file": 1})


@pytest.mark.parametrize("name", ["grid.png", "samples.png", "diagnosis.png"])
def test_a_plot_is_known_by_what_is_written_beside_it(tmp_path, name):
    assert found_in(plant(tmp_path, name)) == ([name], {})


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    text = refusal(load_images, str(plant(tmp_path, "a.tar", "b.tar", "c.txt")), 8)
    assert text.endswith("passed over 3 other files: 2 .tar, 1 .txt; unpack archives")


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    def denied(folder):
        raise PermissionError(13, "Permission denied", folder)

    plant(tmp_path, "a.png")
    monkeypatch.setattr(folders.os, "scandir", denied)
    assert f"cannot read the folder {tmp_path}: Permission denied" in refusal(load_images, str(tmp_path), 8)


# links


def test_links_to_folders_and_files_are_followed(tmp_path):
    plant(tmp_path / "far", "cats/0.png", "cats/more/1.png", "dog.png")
    root = plant(tmp_path / "root", "cat -> ../far/cats", "dog/2.png -> ../../far/dog.png", "dog/3.png")
    assert found_in(root) == (["cat/0.png", "cat/more/1.png", "dog/2.png", "dog/3.png"], {})
    assert load_images(str(root), 8).labels()[1].tolist() == [0, 0, 1, 1]
    (tmp_path / "linked").symlink_to(root)
    assert len(load_images(str(tmp_path / "linked"), 8)) == 4


@pytest.mark.parametrize("target", ["..", ".", "../../root", "../b"])
def test_circles_of_links_end(tmp_path, target):
    root = plant(tmp_path / "root", "a/0.png", "b/1.png", f"a/again -> {target}", "b/again -> ../a")
    assert found_in(root) == (["a/0.png", "b/1.png"], {"reached twice": 2})


def test_an_image_counts_once_where_it_has_its_place(tmp_path):
    root = plant(tmp_path, "a/link.png -> ../b/0.png", "a/1.png", "b/0.png", "a.png -> b/0.png", "c -> b")
    assert found_in(root) == (["a/1.png", "b/0.png"], {"reached twice": 3})


# splits and classes

SPLIT = [
    ("train/cat/0.png", "train/dog/1.png", "test/dog/2.png"),
    ("train/0.png", "val/1.png"),
    ("Train/0.png", "Validation/1.png", "readme.txt"),
    ("train/0.png", "test/1.png", "other/2.png"),
    ("train/0.png", "dev/1.png", "2.png"),
]


@pytest.mark.parametrize("names", SPLIT, ids=str)
def test_splits_are_not_mixed(tmp_path, names):
    splits = sorted({name.split("/")[0] for name in names if "/" in name} - {"other"})
    text = refusal(load_images, str(plant(tmp_path, *names)), 8)
    train = next(name for name in splits if name.lower() == "train")
    assert f"{tmp_path} holds the splits {', '.join(splits)}: give {tmp_path}/{train}" in text
    for given in (f"{tmp_path}/{train}", f"{tmp_path}:{train}"):
        assert all(train in name for name in load_images(given, 8).names)


def test_splits_further_down_are_not_mixed(tmp_path):
    plant(tmp_path, "bottle/train/good/0.png", "bottle/test/good/1.png", "bottle/test/broken/2.png")
    assert f"{tmp_path}/bottle holds the splits test, train" in refusal(load_images, str(tmp_path), 8)
    assert load_images(f"{tmp_path}/bottle/test", 8).labels()[0] == ["broken", "good"]


CLASSES = {
    "one split": (["train/cat/0.png", "train/dog/1.png"], ["cat", "dog"]),
    "one split, and an empty one": (["train/cat/0.png", "train/dog/1.png", "test/readme.txt"], ["cat", "dog"]),
    "a class that is called like a split": (["train/0.png", "car/1.png"], ["train", "car"]),
    "further folders": (["cat/a/0.png", "cat/b/1.png", "dog/a/2.png"], ["cat", "cat", "dog"]),
    "one class": (["cat/a/0.png", "cat/b/1.png"], ["cat", "cat"]),
}


@pytest.mark.parametrize("names, classes", CLASSES.values(), ids=CLASSES.keys())
def test_classes_are_the_folders_below_the_root(tmp_path, names, classes):
    source = load_images(str(plant(tmp_path, *names)), 8)
    assert sorted(source.image_classes) == sorted(classes)


def test_a_split_that_is_not_there_is_named(tmp_path):
    assert f"{tmp_path}/test" in refusal(load_images, f"{plant(tmp_path, 'a.png')}:test", 8)


# names

ODD_NAMES = {
    "not UTF-8": os.fsdecode(b"caf\xe9"),
    "line break": "a\nb",
    "escape": "a\x1b[31mb",
    "quotes": "a'b\"c",
    "colon": "a:train",
    "percent and braces": "%s {0} [1] *",
    "backslash": "a\\b",
    "very long": "x" * 240,
    "another script": "猫　と 🐈",
}


@pytest.mark.parametrize("name", ODD_NAMES.values(), ids=ODD_NAMES.keys())
@pytest.mark.parametrize("place", ["file", "class", "root"])
def test_images_of_any_name_are_read_and_named_in_one_line(tmp_path, name, place):
    root = tmp_path / (name if place == "root" else "root")
    file = f"{name}.png" if place == "file" else "0.png"
    for folder, color in (("class", RED), (name if place == "class" else "other", BLUE)):
        path = root / folder / file
        path.parent.mkdir(parents=True)
        solid("RGB", color).save(path)
    path.write_bytes(b"damaged")
    source = load_images(str(root), 8)
    assert_color(source[source.image_classes.index("class")], RED)
    errors = [str(item) for items in source.batches(0, 2, 2) for _, item in items if not isinstance(item, torch.Tensor)]
    for text in (*source.names, *errors, *source.labels()[0]):
        assert text.encode() and len(text.splitlines()) == 1
    assert len(errors) == 1 and len(set(source.names)) == 2


@pytest.mark.parametrize("name", ODD_NAMES.values(), ids=ODD_NAMES.keys())
def test_caches_and_model_cards_take_any_name(tmp_path, tiny_vae, name):
    root = tmp_path / name
    root.mkdir()
    solid("RGB", RED, (32, 32)).save(root / f"{name}.png")
    (root / f"!{name[1:]}.png").write_bytes(b"damaged")
    source = load_images(str(root), 32)
    for _ in range(2):  # encoded, then read
        options = dict(horizontal_flip=False, batch_size=2, on_bad_image="skip")
        cache = cache_latents(tiny_vae, source, tmp_path / "cache", **options)
        assert len(cache) == 1 and cache.skipped == (source.names[0],)
    assert model_card(parse_config(Config, ["--data.name_or_path", str(root)]), 1).encode()


@pytest.mark.parametrize("name", ["elpv:x", "elpv:train", "owner:name"])
def test_what_is_on_the_disk_goes_first(tmp_path, monkeypatch, name):
    monkeypatch.chdir(plant(tmp_path, f"{name}/0.png", "owner/name/0.png"))
    assert load_images(name, 8).names == [f"{name}/0.png"]
    assert len(load_images("owner/name", 8)) == 1


# archives


def zipped(root, path, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for file in sorted(root.rglob("*")):
            archive.write(file, file.relative_to(root))
    return str(path)


TREE = ["cat/0.png", "cat/a/1.png", "dog/2.png", "__MACOSX/cat/._0.png", "notes.txt", "dog/.DS_Store", "grid.png"]


@pytest.mark.parametrize("wrapper", ["", "pictures/", "pictures/train/"])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_archive_is_read_like_its_folder(tmp_path, wrapper, compression):
    root = plant(tmp_path / "root", *(wrapper + name for name in TREE if name != "grid.png"))
    solid("RGB", BLUE).save(root / wrapper / "dog/2.png", compress_level=0)
    archive = zipped(root, tmp_path / "IMAGES.ZIP", compression=compression)
    source, again = load_images(archive, 8), load_images(archive, 8)
    folder = load_images(str(root / wrapper), 8)
    assert source.names == [name.replace(f"{root}/", f"{archive}/") for name in folder.names]
    assert torch.equal(torch.stack(list(source)), torch.stack(list(folder)))
    assert source.labels()[0] == ["cat", "dog"] and torch.equal(source.labels()[1], folder.labels()[1])
    assert dict(source.passed_over) == dict(folder.passed_over) == {"hidden": 2, ".txt": 1}
    assert again.fingerprint == source.fingerprint
    solid("RGB", RED).save(root / wrapper / "dog/2.png", compress_level=0)  # as many bytes
    assert load_images(zipped(root, archive), 8).fingerprint != source.fingerprint


def test_splits_of_an_archive(tmp_path):
    archive = zipped(plant(tmp_path / "root", "x/train/0.png", "x/test/1.png"), tmp_path / "a.zip")
    assert f"{archive}/x holds the splits test, train: give {archive}:x/train" in refusal(load_images, archive, 8)
    assert load_images(f"{archive}:x/test", 8).names == [f"{archive}/x/test/1.png"]
    assert "no images" in refusal(load_images, f"{archive}:x/val", 8)


def changed_data(raw):
    raw[raw.index(b"IDAT") + 8] ^= 255


def encrypted(raw):
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        raw[raw.index(signature) + offset] |= 1


@pytest.mark.parametrize("damage", [changed_data, encrypted])
def test_a_member_that_cannot_be_read_is_named(tmp_path, damage):
    archive = zipped(plant(tmp_path / "root", "a.png", "b.png"), tmp_path / "a.zip")
    raw = bytearray((tmp_path / "a.zip").read_bytes())
    damage(raw)
    (tmp_path / "a.zip").write_bytes(raw)
    source = load_images(archive, 8)
    assert f"{archive}/a.png" in refusal(source.__getitem__, 0)
    assert_color(source[1], RED)


def test_a_forked_process_opens_the_archive_for_itself(tmp_path, monkeypatch):
    path = zipped(plant(tmp_path / "root", "a.png"), tmp_path / "a.zip")
    archive = folders.ZipArchive(path)
    archive.read(f"{path}/a.png")
    first = archive.opened[1]
    archive.read(f"{path}/a.png")
    assert archive.opened[1] is first
    monkeypatch.setattr(folders.os, "getpid", lambda: 0)
    archive.read(f"{path}/a.png")
    assert archive.opened[1] is not first


@pytest.mark.parametrize("content", [b"", b"hello"])
def test_a_damaged_archive_is_named(tmp_path, content):
    (tmp_path / "a.zip").write_bytes(content)
    assert f"cannot read {tmp_path}/a.zip" in refusal(load_images, str(tmp_path / "a.zip"), 8)


OTHER_FILES = {
    "a.tar": "unpack it",
    "a.tar.gz": "unpack it",
    "a.tgz": "unpack it",
    "a.7z": "unpack it",
    "a.png": "give the folder that holds",
    "a.csv": "give a folder of images, a .zip",
    "a.json": "give a folder of images, a .zip",
    "a": "give a folder of images, a .zip",
}


@pytest.mark.parametrize("name, advice", OTHER_FILES.items())
def test_other_files_are_refused_with_advice(tmp_path, name, advice):
    text = refusal(load_images, str(plant(tmp_path, name) / name), 8)
    assert f"{tmp_path}/{name} " in text and advice in text
