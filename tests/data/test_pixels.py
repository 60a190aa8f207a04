"""Decoded images on the disk, the tenth for validation, and crops."""

import pytest
import torch
from conftest import refusal
from PIL import Image

from latent_dmmd.data.pixels import cache_images, random_crops, validation_indices
from latent_dmmd.data.sources import ImageDataset, load_images
from latent_dmmd.utils.errors import DataError


def test_images_come_back_from_the_disk_as_they_were_decoded(tiny_images, tmp_path, monkeypatch):
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(tiny_images / "clear.png")
    Image.new("L", (40, 32), 7).save(tiny_images / "grey.png")
    source = load_images(str(tiny_images), 32)
    for _ in range(2):
        cached = cache_images(source, tmp_path / "cache", shard_size=5)
        assert len(cached) == 14 and len(cached.shards) == 3
        assert all(torch.equal(cached[i], source[i]) for i in range(14))
        with pytest.raises(IndexError):
            cached[14]
        monkeypatch.setattr(ImageDataset, "batches", None)  # the second time nothing is decoded
    assert (cached[source.names.index(str(tiny_images / "clear.png"))] == 255).all()


def test_an_interrupted_reading_goes_on(tiny_images, tmp_path):
    source = load_images(str(tiny_images), 32)
    cache_images(source, tmp_path / "cache", shard_size=5)
    shards = sorted((tmp_path / "cache").glob("*.safetensors"))
    kept = shards[0].stat().st_mtime_ns
    shards[1].unlink()
    assert torch.equal(cache_images(source, tmp_path / "cache", shard_size=5)[7], source[7])
    assert shards[0].stat().st_mtime_ns == kept


def test_a_cache_of_something_else_and_a_damaged_one_are_refused(tiny_images, tmp_path):
    source, cache = load_images(str(tiny_images), 32), tmp_path / "cache"
    cache_images(source, cache)
    assert "another resolution" in refusal(cache_images, load_images(str(tiny_images), 16), cache)
    (shard,) = cache.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:100])
    assert "damaged; delete it" in refusal(cache_images, source, cache)


def test_what_cannot_be_read_is_named_or_left_out(tiny_images, tmp_path):
    (tiny_images / "05.png").write_bytes(b"no image")
    source, cache = load_images(str(tiny_images), 32), tmp_path / "cache"
    assert "05.png" in refusal(cache_images, source, cache)
    cached = cache_images(source, cache, on_bad_image="skip")
    assert len(cached) == 11 and torch.equal(cached[5], source[6])
    assert "leave out" in refusal(cache_images, source, cache)
    for path in tiny_images.iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="none of the 12 images could be read"):
        cache_images(load_images(str(tiny_images), 32), tmp_path / "other", on_bad_image="skip")


def test_the_tenth_is_fixed_and_bounded():
    assert validation_indices(100) == validation_indices(100) and len(set(validation_indices(100))) == 10
    assert [len(validation_indices(n)) for n in (1, 9, 2560, 100_000)] == [1, 1, 256, 256]


def test_crops_are_windows_of_the_images_flipped_or_not():
    images_uint8 = torch.randint(0, 256, (4, 3, 48, 48), dtype=torch.uint8)
    crops = random_crops(images_uint8, 6, 32, torch.Generator().manual_seed(0))
    again = random_crops(images_uint8, 6, 32, torch.Generator().manual_seed(0))
    assert torch.equal(crops, again) and crops.shape == (6, 3, 32, 32)
    windows = images_uint8.unfold(2, 32, 1).unfold(3, 32, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 32, 32)
    for crop in ((crops + 1) * 127.5).round().to(torch.uint8):
        views = [crop, crop.flip(1), crop.flip(2), crop.flip(1, 2)]
        assert any((windows == view).flatten(1).all(1).any() for view in views)


@pytest.mark.parametrize("horizontal", [False, True])
@pytest.mark.parametrize("vertical", [False, True])
def test_crops_are_mirrored_as_told(horizontal, vertical):
    image = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4).expand(1, 3, 4, 4)
    crops = random_crops(image, 64, 4, torch.Generator().manual_seed(0), horizontal, vertical)
    corners = {round(float((crop[0, 0, 0] + 1) * 127.5)) for crop in crops}
    expected = {(False, False): {0}, (True, False): {0, 3}, (False, True): {0, 12}, (True, True): {0, 3, 12, 15}}
    assert corners == expected[horizontal, vertical]
