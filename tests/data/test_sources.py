import datasets
import pytest
from conftest import RED, assert_color, refusal, solid

from latent_dmmd.data.sources import describe, load_images
from latent_dmmd.training import loop
from latent_dmmd.training.config import Config, parse_config
from latent_dmmd.utils.errors import DataError


def test_folder_in_order(tiny_images):
    (tiny_images / "notes.txt").write_text("no image")
    source = load_images(str(tiny_images), 32)
    assert source.names == [str(tiny_images / f"{i:02d}.png") for i in range(12)]
    assert len(list(source)) == len(source) == 12
    with pytest.raises(IndexError):
        source[12]


@pytest.mark.parametrize("name", ["missing", "missing.parquet", "notes.txt"])
def test_missing(tmp_path, name):
    (tmp_path / "notes.txt").write_text("no image")
    assert str(tmp_path / name) in refusal(load_images, str(tmp_path / name), 8)


def test_empty_folder(tmp_path):
    text = refusal(load_images, str(tmp_path), 8)
    assert str(tmp_path) in text and ".png" in text


def test_relative_name_that_is_neither_folder_nor_on_the_hub():
    assert "no-such-folder" in refusal(load_images, "no-such-folder", 8)
    assert "nobody/nothing" in refusal(load_images, "nobody/nothing:test", 8)


def test_hub_name_with_split(monkeypatch):
    asked = []
    table = datasets.Dataset.from_dict({"image": [solid("RGB", RED)]}, datasets.Features({"image": datasets.Image()}))
    monkeypatch.setattr(datasets, "load_dataset", lambda path, split: asked.append((path, split)) or table)
    assert_color(load_images("owner/name", 8)[0], RED)
    assert_color(load_images("owner/name:test[:5]", 8)[0], RED)
    assert asked == [("owner/name", "train"), ("owner/name", "test[:5]")]


def test_fingerprint_follows_the_data(tiny_images):
    target = tiny_images / "03.png"
    (tiny_images / "link.png").symlink_to(target)

    def fingerprint():
        return load_images(str(tiny_images), 32).fingerprint

    seen = [fingerprint()]
    assert fingerprint() == seen[0]
    target.rename(tiny_images.parent / "elsewhere.png")
    (tiny_images / "link.png").unlink()
    (tiny_images / "link.png").symlink_to(tiny_images.parent / "elsewhere.png")
    seen.append(fingerprint())
    solid("RGB", RED, (32, 32)).save(tiny_images.parent / "elsewhere.png")
    seen.append(fingerprint())
    solid("RGB", RED, (32, 32)).save(tiny_images / "new.png")
    seen.append(fingerprint())
    assert len(set(seen)) == 4


def test_elpv_splits():
    pytest.importorskip("elpv_dataset")
    train, heldout, everything = (load_images(f"elpv{s}", 64) for s in (":train", ":heldout", ""))
    assert (len(train), len(heldout), len(everything)) == (2361, 263, 2624)
    assert not set(train.names) & set(heldout.names)
    assert set(train.names) | set(heldout.names) == set(everything.names)
    assert heldout.names == everything.names[::10]
    fit, validation = (load_images(f"elpv:{s}", 64) for s in ("fit", "validation"))
    assert sorted(fit.names + validation.names) == train.names and validation.names == everything.names[5::10]
    assert train[0].shape == (3, 64, 64)
    assert "elpv:heldout" in refusal(load_images, "elpv:test")


def test_elpv_not_installed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "elpv_dataset", None)
    assert "latent-dmmd[demo]" in refusal(load_images, "elpv:train")


def sorted_in(folder, counts):
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            solid("RGB", RED).save(folder / name / f"{i}.png")
    return load_images(str(folder), 8)


def test_what_there_is_is_described(tmp_path, tiny_images):
    assert describe(load_images(str(tiny_images), 8)) == f"data: 12 images of {tiny_images}"
    source = sorted_in(tmp_path / "sorted", {"b": 2, "a": 3})
    assert describe(source) == f"data: 5 images of {source.name}\n2 classes: a 3, b 2"
    for name in (".a.png", ".DS_Store", "b/Thumbs.db", "1.txt", "2.txt", "x.svg"):
        (tmp_path / "sorted" / name).write_text("")
    (tmp_path / "sorted" / "link.png").symlink_to("nowhere")
    lines = describe(load_images(source.name, 8)).splitlines()
    assert lines[2] == "passed over 7 other files: 3 hidden, 2 .txt, 1 .svg, 1 broken link"


def test_many_classes_are_described_in_short(tmp_path):
    text = describe(sorted_in(tmp_path, {f"{i:03d}": 1 + i % 2 for i in range(13)}))
    assert text.splitlines()[1] == f"13 classes: {', '.join(f'{i:03d} {1 + i % 2}' for i in range(10))}, " + (
        "and 3 more, of 1 to 2 images each"
    )


def test_training_says_what_it_trains_on_and_once(arguments, workshop, monkeypatch, capfd):
    def stop(*_):
        raise DataError("far enough")

    monkeypatch.setattr(loop, "prepare_run_folder", stop)
    assert refusal(loop.train, parse_config(Config, arguments)) == "far enough"
    assert capfd.readouterr().out.count(f"data: 12 images of {workshop / 'images'}\n") == 1
