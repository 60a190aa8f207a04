"""Tables of images: where they lie, their cells and their labels."""

import os
import pickle
import shutil
import zipfile
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import BLUE, RED, assert_color, refusal, solid
from PIL import Image
from processes import CONTEXT
from torch.utils.data import ConcatDataset, DataLoader

from latent_dmmd.data import sources
from latent_dmmd.data.sources import describe, load_images


@pytest.fixture
def write_table(tmp_path, monkeypatch):
    """From columns to a parquet file, with `image` and `other` as images."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")

    def write(**columns):
        table = datasets.Dataset.from_dict(columns)
        for name in columns.keys() & {"image", "other"}:
            table = table.cast_column(name, datasets.Image())
        table.to_parquet(str(tmp_path / "table.parquet"))
        return str(tmp_path / "table.parquet")

    return write


def encoded(image):
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def test_parquet(write_table):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    path = write_table(image=[encoded(Image.fromarray(p)) for p in pixels], label=[0, 1, 2])
    source = load_images(path, 8)
    assert source.names[1] == f"{path}[1]"
    assert torch.equal(torch.stack(list(source)), torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert load_images(path, 8).fingerprint == source.fingerprint
    write_table(image=[encoded(Image.fromarray(p)) for p in 255 - pixels], label=[0, 1, 2])
    again = load_images(path, 8)
    assert again.fingerprint != source.fingerprint
    assert torch.equal(again[0], 255 - torch.from_numpy(pixels[0]).permute(2, 0, 1))


def test_image_column(write_table):
    bad = {"bytes": b"hello", "path": None}
    path = write_table(image=[encoded(solid("RGB", RED)), bad], other=[encoded(solid("RGB", BLUE))] * 2, label=[1, 2])
    assert_color(load_images(path, 8)[0], RED)
    # a bad image in a column that is not asked for does no harm
    assert_color(load_images(path, 8, image_column="other")[1], BLUE)
    text = refusal(load_images, path, 8, image_column="photo")
    assert "'photo'" in text and "image, other, label" in text
    assert "'label'" in refusal(load_images, path, 8, image_column="label")


def test_bad_cells_are_named(write_table):
    cells = [
        None,
        {"bytes": b"", "path": None},
        {"bytes": b"hello", "path": None},
        encoded(solid("RGB", BLUE)),
    ]
    source = load_images(write_table(image=cells), 8)
    for i in range(3):
        assert f"table.parquet[{i}]" in refusal(source.__getitem__, i)
    assert_color(source[3], BLUE)


def test_column_of_file_names(write_table, tiny_images):
    source = load_images(str(tiny_images), 32)
    table = load_images(write_table(file=[*source.names, "missing.png"]), 32, image_column="file")
    assert all(torch.equal(table[i], source[i]) for i in range(12))
    assert "table.parquet[12]" in refusal(table.__getitem__, 12)


def test_table_that_is_none(write_table):
    path = write_table(image=[encoded(solid("RGB", RED))])
    Path(path).write_bytes(b"hello")
    assert path in refusal(load_images, path, 8)
    assert path in refusal(load_images, write_table(image=[]), 8)


# where tables lie


@pytest.fixture
def tables(tiny_images, tmp_path, monkeypatch):
    """The twelve tiny images in every kind of data set: name to what `load_images` is given. Their labels are 0 and 1
    in turn; the split `test` holds the first four."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.chdir(tmp_path)
    files = sorted(tiny_images.iterdir())
    cells = {"image": [{"bytes": f.read_bytes(), "path": None} for f in files], "label": [i % 2 for i in range(12)]}
    table = datasets.Dataset.from_dict(cells).cast_column("image", datasets.Image())
    parts = {"train": table, "test": table.select(range(4))}
    Path("hub/data").mkdir(parents=True)
    Path("odd[1] *").mkdir()
    for i in range(2):
        table.select(range(6 * i, 6 * i + 6)).to_parquet(f"hub/data/train-0000{i}-of-00002.parquet")
    parts["test"].to_parquet("hub/data/test-00000-of-00001.parquet")
    table.to_parquet("odd[1] */a,b:train.parquet")
    shutil.copytree("odd[1] *", os.fsdecode(b"caf\xe9"))
    table.save_to_disk("saved")
    datasets.DatasetDict(parts).save_to_disk("dict")
    with zipfile.ZipFile("images.zip", "w") as archive:
        for i, file in enumerate(files):
            archive.write(file, f"{i % 2}/{file.name}")
            (tmp_path / "sorted" / str(i % 2)).mkdir(parents=True, exist_ok=True)
            (tmp_path / "sorted" / str(i % 2) / file.name).symlink_to(file)
    return tmp_path


KINDS = [
    "images",
    "sorted",
    "images.zip",
    "hub",
    "hub:train",
    "hub/data/train-*.parquet",
    "hub/**/train-*.parquet",
    "hub/data/train-00000-of-00002.parquet, hub/data/train-00001-of-00002.parquet",
    "odd[1] */a,b:train.parquet",
    "odd[1] *",
    os.fsdecode(b"caf\xe9"),
    "saved",
    "saved/data-00000-of-00001.arrow",
    "dict",
    "dict:train",
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_images_are_the_same_wherever_they_lie_and_in_another_process(tables, name, streaming):
    expected = load_images("images", 32)
    for source in (load_images(name, 32, streaming=streaming), load_images(name, 32, streaming=streaming)):
        for _ in range(2):  # here, and then as a new process has it
            read = dict(item for items in source.batches(0, 12, 5) for item in items)
            order = sorted(read, key=lambda name: Path(name).name) if name in ("sorted", "images.zip") else list(read)
            assert torch.equal(torch.stack([read[name] for name in order]), torch.stack(list(expected)))
            source = pickle.loads(pickle.dumps(source))
    if not hasattr(source, "position") and name != "images":
        names, labels = source.labels()
        assert names == ["0", "1"] and labels.bincount().tolist() == [6, 6]
        assert source.fingerprint == load_images(name, 32).fingerprint


@pytest.mark.parametrize("name", ["hub:test", "dict:test", "hub:train[:4]"])
def test_splits_of_tables(tables, name):
    assert torch.equal(torch.stack(list(load_images(name, 32))), torch.stack(list(load_images("images", 32)))[:4])


def test_workers_that_share_nothing_read_the_same(tables):
    together = ConcatDataset([load_images(name, 32) for name in ("sorted", "images.zip", "hub", "saved")])
    loader = DataLoader(together, 6, num_workers=1, multiprocessing_context=CONTEXT)
    assert torch.equal(torch.cat(list(loader)), torch.stack(list(together)))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_fingerprint_follows_the_shards_of_a_folder(tables, streaming):
    before = load_images("hub", 32, streaming=streaming).fingerprint
    shutil.copy("hub/data/test-00000-of-00001.parquet", "hub/data/train-00001-of-00002.parquet")
    assert load_images("hub", 32, streaming=streaming).fingerprint != before


REFUSED = {
    "hub:val": "'train', 'test'",
    "dict:val": "it has train, test",
    "saved:train": "has no splits; leave out :train",
    "hub/data/val-*.parquet": "no file hub/data/val-*.parquet",
    "hub/data/train-00000-of-00002.parquet,missing.parquet": "no file missing.parquet",
    "hub/data/train-*.parquet,saved/data-00000-of-00001.arrow": "mixes parquet and arrow",
    "hub/data/*.tar": "there is no folder or file hub/data/*.tar",
    "https://example.org/images.zip": "there is no folder or file https://example.org/images.zip",
    "a/b/c": "there is no folder or file a/b/c",
    "": "there is no folder or file ''",
    "nobody/nothing": "there is no folder nobody/nothing, and the hub is out of reach",
    "nothing:test": "there is no folder nothing, and the hub is out of reach",
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name, message", REFUSED.items())
def test_what_cannot_be_had_is_named(tables, name, message, streaming):
    if name == "hub:val" and streaming:
        message = "Bad split: val"
    assert message in refusal(load_images, name, 32, streaming=streaming)


def test_a_name_that_the_hub_does_not_know(monkeypatch, tmp_path):
    def unknown(path, split):
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{path}' doesn't exist on the Hub")

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets, "load_dataset", unknown)
    assert "no folder nobody/nothing, and no data set of this name" in refusal(load_images, "nobody/nothing", 8)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["hub", "hub/data/train-*.parquet", "nobody/nothing"])
@pytest.mark.parametrize("kind, why", [("file", "Not a directory"), ("dangling", "No such file or directory")])
def test_a_cache_that_cannot_be_written_is_named(tables, monkeypatch, name, streaming, kind, why):
    Path("file").write_text("no folder")
    Path("dangling").symlink_to("nowhere")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(kind, "hf"))
    text = refusal(load_images, name, 32, streaming=streaming)
    assert f"cannot write the cache folder {kind}/hf: {why}; set HF_HOME or HF_DATASETS_CACHE" in text


# labels

BAD_LABELS = {
    "missing numbers": ([0, None, 1, None], "names no class in 2 of 4 rows: 1, 3"),
    "missing names": (["a", "", None, "b"], "names no class in 2 of 4 rows: 1, 2"),
    "all missing": ([None] * 8, "names no class in 8 of 8 rows: 0, 1, 2, 3, 4, …"),
    "floats": ([0.5, 1.0], "holds float64, such as 0.5 in row 0"),
    "truth values": ([True, False], "holds bool, such as True in row 0"),
    "lists": ([[0], [1]], "ist, such as [0] in row 0"),
}


@pytest.mark.parametrize("labels, message", BAD_LABELS.values(), ids=BAD_LABELS.keys())
def test_labels_that_are_no_classes_are_named(write_table, labels, message):
    source = load_images(write_table(image=[encoded(solid("RGB", RED))] * len(labels), label=labels), 8)
    assert message in refusal(source.labels)
    assert describe(source) == f"data: {len(labels)} images of {source.name}"  # they do no harm until asked for


def test_a_declared_class_that_is_missing_is_not_the_last(write_table):
    cells = [encoded(solid("RGB", RED))] * 3
    feature = datasets.ClassLabel(names=["zebra", "ant"])
    path = write_table(image=cells, label=[0, 1, -1])
    datasets.Dataset.from_parquet(path).cast_column("label", feature).to_parquet(path)
    assert "names no class in 1 of 3 rows: 2" in refusal(load_images(path, 8).labels)


def test_numbers_are_in_their_order_whatever_their_names(write_table):
    labels = ["10", "-1", "2", "02", "b", "a"]
    path = write_table(image=[encoded(solid("RGB", RED))] * 6, label=labels)
    assert load_images(path, 8).labels()[0] == ["-1", "02", "2", "10", "a", "b"]


def test_the_column_is_read_once(write_table, monkeypatch):
    calls = []
    path = write_table(image=[encoded(solid("RGB", RED))] * 2, label=[0, 1])
    monkeypatch.setattr(sources, "column_classes", lambda table, name: calls.append(name) or ["0", "1"])
    source = load_images(path, 8)
    assert calls == []
    for _ in range(3):
        describe(source)
        source.labels()
    assert calls == [path]
