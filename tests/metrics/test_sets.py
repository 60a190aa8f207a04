"""Sets of images by name, and the .npz of samples of guided-diffusion."""

import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from conftest import refusal
from PIL import Image

from latent_dmmd.metrics.sets import check_npz, compression_warnings, load_set, save_samples
from latent_dmmd.utils.errors import DataError


def random_images(n, size=16):
    return torch.randint(256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def stacked(images):
    return torch.stack([images[i] for i in range(len(images))])


def test_samples_are_what_guided_diffusion_reads(tmp_path):
    """Its reader: a stored or deflated member arr_0.npy of format 1.0 or 2.0, whose bytes follow the header."""
    images = random_images(5)
    save_samples(images, tmp_path / "a" / "samples.npz")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["samples.npz"]
    with zipfile.ZipFile(tmp_path / "a" / "samples.npz") as archive, archive.open("arr_0.npy") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        pixels = np.frombuffer(file.read(), dtype).reshape(shape)
    assert shape == (5, 16, 16, 3) and not fortran and dtype == np.uint8
    assert np.array_equal(pixels, images.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.load(tmp_path / "a" / "samples.npz")["arr_0"], pixels)


def test_samples_are_read_as_they_were_written(tmp_path):
    images = random_images(6)
    save_samples(images, tmp_path / "ours.npz")
    np.savez_compressed(tmp_path / "theirs.npz", images.permute(0, 2, 3, 1).numpy(), np.arange(6))
    for name in ("ours.npz", "theirs.npz"):
        assert torch.equal(stacked(load_set(str(tmp_path / name), 16)), images)


def test_samples_of_another_size_are_resized_like_files(tmp_path):
    pixels = random_images(3, size=24).permute(0, 2, 3, 1).numpy()[:, :20]
    (tmp_path / "files").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "files" / f"{i}.png")
    np.savez(tmp_path / "samples.npz", pixels)
    sets = [stacked(load_set(str(tmp_path / name), 16)) for name in ("files", "samples.npz")]
    assert torch.equal(*sets)


def test_samples_are_written_one_image_at_a_time(tmp_path):
    images = random_images(8, size=256)
    tracemalloc.start()
    save_samples(images, tmp_path / "samples.npz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * images[0].numel()


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"images": np.zeros((2, 8, 8, 3), np.uint8)}, "holds no arr_0, uint8 images with shape (N, H, W, 3); it has"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.float32)}, "must be uint8 images with shape (N, H, W, 3); it is float32"),
        ({"arr_0": np.zeros((2, 3, 8, 8), np.uint8)}, "it is uint8 (2, 3, 8, 8)"),
        ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, "it is uint8 (0, 8, 8, 3)"),
        ({"arr_0": np.zeros((2, 8, 8, 1), np.uint8)}, "it is uint8 (2, 8, 8, 1)"),
        ({"arr_0": np.array([{}])}, "Object arrays cannot be loaded"),
        ({}, "holds no arr_0"),
    ],
)
def test_arrays_that_are_no_samples_are_named(arrays, message, tmp_path):
    np.savez(tmp_path / "samples.npz", **arrays)
    assert message in refusal(load_set, str(tmp_path / "samples.npz"), 8)


def test_files_that_are_no_npz_are_named(tmp_path):
    path = tmp_path / "samples.npz"
    assert "cannot read" in refusal(load_set, str(path), 8)
    save_samples(random_images(4), path)
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 255
    for content in (b"", b"text", whole[: len(whole) // 2], bytes(damaged)):
        path.write_bytes(content)
        assert "cannot read" in refusal(load_set, str(path), 8)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    assert "cannot read" in refusal(load_set, str(path), 8)


def test_a_file_of_arrays_is_named_npz(tmp_path):
    check_npz(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="name it FILE.npz"):
        check_npz(tmp_path / "a.npy")
    with pytest.raises(OSError, match="it is a folder"):
        (tmp_path / "b.npz").mkdir()
        check_npz(tmp_path / "b.npz")


def test_images_that_cannot_be_read_are_left_out_by_name(tiny_images):
    bad = sorted(tiny_images.iterdir())[3:5]
    for path in bad:
        path.write_bytes(b"damaged")
    images = load_set(str(tiny_images), 32, on_bad_image="skip")
    assert len(stacked(images)) == 10 and images.skipped == tuple(map(str, bad))
    with pytest.raises(DataError, match="03.png"):
        stacked(load_set(str(tiny_images), 32))


def test_what_was_found_and_passed_over_is_said(tiny_images):
    (tiny_images / "notes.txt").write_text("notes")
    found = f"data: 12 images of {tiny_images}\npassed over 1 other file: 1 .txt"
    assert load_set(str(tiny_images), 32).description == found


def test_a_draw_is_of_images_that_can_be_read(tiny_images):
    for path in sorted(tiny_images.iterdir())[::2]:
        path.write_bytes(b"damaged")
    draw = dict(num_images=5, on_bad_image="skip", generator=torch.Generator().manual_seed(1))
    images = load_set(str(tiny_images), 32, **draw)
    assert len(stacked(images)) == 5 and 0 < len(images.skipped) <= 6
    assert len(load_set(str(tiny_images), 32, num_images=99, on_bad_image="skip")) == 6


@pytest.mark.parametrize("suffix, expected", [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")])
def test_the_format_is_of_the_files_whatever_their_names(suffix, expected, tmp_path):
    for i in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.{suffix}")
    (tmp_path / f"0.{suffix}").rename(tmp_path / "0.bmp")
    (tmp_path / f"1.{suffix}").write_bytes(b"damaged")
    assert load_set(str(tmp_path), 8).file_format == expected


def test_jpeg_against_another_format_is_said_once():
    assert compression_warnings("PNG", "PNG") == compression_warnings("JPEG", "JPEG") == []
    assert compression_warnings(None, "JPEG") == compression_warnings("BMP", "PNG") == []
    (line,) = compression_warnings("PNG", "JPEG")
    assert line.startswith("the reference is JPEG, the generated images are PNG: Fréchet distances see compression")
    assert "reference is PNG, the generated images are JPEG" in compression_warnings("JPEG", "PNG")[0]
