from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import BLUE, RED, assert_color, refusal, solid
from PIL import Image

from latent_dmmd.data.sources import load_images


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
