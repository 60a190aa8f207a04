import itertools
import json
from functools import partial
from io import BytesIO
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import RED, WHITE, frozen, refusal, solid
from processes import run
from safetensors.torch import load_file

from latent_dmmd.data import particles as caching
from latent_dmmd.data import shards, sources
from latent_dmmd.data.autoencoder import encode_moments, standardise
from latent_dmmd.data.sources import load_images
from latent_dmmd.utils.errors import DataError
from latent_dmmd.utils.files import default_cache_dir
from latent_dmmd.utils.images import to_pixels

cache_latents = partial(caching.cache_latents, horizontal_flip=True, batch_size=16)
cache_pixels = partial(caching.cache_pixels, horizontal_flip=False)


@pytest.fixture
def source(tiny_images):
    return load_images(str(tiny_images), 32)


@pytest.fixture
def encoded_batches(monkeypatch):
    """The number of images, mirrored or not, of each batch that is encoded."""
    sizes = []

    def counted(vae, pixels):
        sizes.append(len(pixels))
        return encode_moments(vae, pixels)

    monkeypatch.setattr(caching, "encode_moments", counted)
    return sizes


def assert_equal_caches(a, b):
    assert torch.equal(a.mean, b.mean) and torch.equal(a.channel_mean, b.channel_mean)
    assert torch.equal(a.channel_std, b.channel_std) and a.skipped == b.skipped
    assert (a.std is None and b.std is None) or torch.equal(a.std, b.std)


def leftovers(folder):
    return [p.name for p in folder.rglob("*") if "partial" in p.name]


def test_cache_holds_the_moments(each_vae, source, tmp_path):
    cache = cache_latents(each_vae, source, tmp_path / "cache", batch_size=12)
    pixels = to_pixels(torch.stack(list(source)))
    mean, std = encode_moments(each_vae, pixels)
    assert len(cache) == 12 and cache.mean.shape == (12, 2, 4, 16, 16) and cache.skipped == ()
    torch.testing.assert_close(cache.mean[:, 0], mean)
    if type(each_vae).__name__ == "AutoencoderKL":
        torch.testing.assert_close(cache.std[:, 0], std)
    else:
        assert cache.std is None
    # mirrored images are encoded; their latents are not mirrored latents
    mirrored = encode_moments(each_vae, pixels.flip(-1))[0]
    torch.testing.assert_close(cache.mean[:, 1], mirrored)
    assert not torch.allclose(mirrored, mean.flip(-1), rtol=1e-2, atol=1e-3)


def test_second_call_reads(each_vae, source, tmp_path, monkeypatch):
    first = cache_latents(each_vae, source, tmp_path / "cache", shard_size=5, batch_size=3)
    monkeypatch.setattr(caching, "encode_moments", None)
    monkeypatch.setattr(sources, "read_image", None)
    assert_equal_caches(first, cache_latents(each_vae, source, tmp_path / "cache", shard_size=5, batch_size=4))


def test_without_mirrored_images(tiny_vae, source, tmp_path):
    cache = cache_latents(tiny_vae, source, tmp_path / "cache", horizontal_flip=False)
    assert cache.mean.shape[1] == 1
    assert cache.draw(5, torch.Generator().manual_seed(0)).shape == (5, 4, 16, 16)


def test_default_folder_is_named_by_what_it_holds(tiny_vae, tiny_images, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    for resolution in (32, 16, 32):
        cache_latents(tiny_vae, load_images(str(tiny_images), resolution))
    assert len(list((tmp_path / "xdg" / "latent_dmmd").iterdir())) == 2
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "latent_dmmd"


@pytest.mark.parametrize("changed", ["autoencoder", "data", "num_pictures", "resolution", "horizontal_flip"])
def test_cache_of_something_else(tiny_vae, tiny_images, tmp_path, changed):
    vae, folder, options = tiny_vae, tmp_path / "cache", {}
    cache_latents(vae, load_images(str(tiny_images), 32), folder)
    before = {p: p.read_bytes() for p in folder.iterdir()}
    if changed == "autoencoder":
        vae = frozen("AutoencoderKL", seed=1)
    elif changed == "data":
        solid("RGB", RED, (32, 32)).save(tiny_images / "00.png")
    elif changed == "num_pictures":
        (tiny_images / "00.png").unlink()
    elif changed == "horizontal_flip":
        options = {"horizontal_flip": False}
    source = load_images(str(tiny_images), 16 if changed == "resolution" else 32)
    text = refusal(cache_latents, vae, source, folder, **options)
    assert str(folder) in text and "--data.cache_dir" in text
    names = text.split("another ")[1].split(";")[0].split(", ")
    assert names == (["data", "num_pictures"] if changed == "num_pictures" else [changed])
    assert before == {p: p.read_bytes() for p in folder.iterdir()}


def test_folder_of_something_else(tiny_vae, source, tiny_images):
    before = sorted(tiny_images.iterdir())
    assert "holds no latent cache" in refusal(cache_latents, tiny_vae, source, tiny_images)
    assert sorted(tiny_images.iterdir()) == before


@pytest.mark.parametrize("text", ["", "{", "{}", "\x80"])
def test_damaged_manifest(tiny_vae, source, tmp_path, text):
    cache_latents(tiny_vae, source, tmp_path / "cache")
    (tmp_path / "cache" / "manifest.json").write_text(text, encoding="latin-1")
    assert "autoencoder" in refusal(cache_latents, tiny_vae, source, tmp_path / "cache")


def test_truncated_shard(tiny_vae, source, tmp_path):
    whole = cache_latents(tiny_vae, source, tmp_path / "whole", shard_size=5)
    cache_latents(tiny_vae, source, tmp_path / "cache", shard_size=5)  # not kept: its shards are memory-mapped
    shard = sorted((tmp_path / "cache").glob("*.safetensors"))[1]
    for size in (shard.stat().st_size - 10, 4, 0):
        shard.write_bytes(shard.read_bytes()[:size])
        text = refusal(cache_latents, tiny_vae, source, tmp_path / "cache", shard_size=5)
        assert str(shard) in text and "delete it" in text
    shard.unlink()
    assert_equal_caches(whole, cache_latents(tiny_vae, source, tmp_path / "cache", shard_size=5))


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_interrupted_build_goes_on(tiny_vae, source, tmp_path, monkeypatch, encoded_batches, interruption):
    options = dict(shard_size=5, batch_size=2, horizontal_flip=False)
    whole = cache_latents(tiny_vae, source, tmp_path / "whole", **options)
    assert sum(encoded_batches) == 12
    encoded_batches.clear()
    counted = caching.encode_moments

    def interrupted(vae, pixels):
        if len(encoded_batches) == 4:  # the first shard takes three batches
            raise interruption
        return counted(vae, pixels)

    monkeypatch.setattr(caching, "encode_moments", interrupted)
    folder = tmp_path / "cache"
    with pytest.raises(interruption):
        cache_latents(tiny_vae, source, folder, **options)
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "moments-00000000.safetensors"]
    encoded_batches.clear()
    monkeypatch.setattr(caching, "encode_moments", counted)
    assert_equal_caches(whole, cache_latents(tiny_vae, source, folder, **options))
    assert sum(encoded_batches) == 12 - 5
    for shard in folder.glob("*.safetensors"):
        found, expected = load_file(shard), load_file(tmp_path / "whole" / shard.name)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_no_partial_file_is_left_or_read(tiny_vae, source, tmp_path, monkeypatch):
    def disk_full(tensors, path, metadata):
        Path(path).write_bytes(b"half a shard")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards, "save_file", disk_full)
        with pytest.raises(OSError, match="no space"):
            cache_latents(tiny_vae, source, tmp_path / "cache")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["manifest.json"]
    # one that a killed process left does no harm
    (tmp_path / "cache" / ".moments-00000000.safetensors.1.partial").write_bytes(b"half a shard")
    assert len(cache_latents(tiny_vae, source, tmp_path / "cache")) == 12


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_image_stops_and_is_named(tiny_vae, tiny_images, tmp_path, num_workers):
    (tiny_images / "07.png").write_bytes(b"hello")
    source = load_images(str(tiny_images), 32)
    text = refusal(cache_latents, tiny_vae, source, tmp_path / "cache", num_workers=num_workers)
    assert str(tiny_images / "07.png") in text and "--data.on_bad_image skip" in text and "Traceback" not in text
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_images_are_skipped_and_named(tiny_vae, tiny_images, tmp_path, num_workers):
    good = cache_latents(tiny_vae, load_images(str(tiny_images), 32), tmp_path / "good", batch_size=1)
    for i in (1, 4, 5, 6, 7):
        (tiny_images / f"{i:02d}.png").write_bytes(b"hello")
    source = load_images(str(tiny_images), 32)
    # the shard of images 4 to 7 is empty
    options = dict(shard_size=4, batch_size=1, num_workers=num_workers)
    for _ in range(2):
        cache = cache_latents(tiny_vae, source, tmp_path / "cache", on_bad_image="skip", **options)
        assert cache.skipped == tuple(str(tiny_images / f"{i:02d}.png") for i in (1, 4, 5, 6, 7))
        assert torch.equal(cache.mean, good.mean[[0, 2, 3, 8, 9, 10, 11]])
    assert str(tiny_images / "01.png") in refusal(cache_latents, tiny_vae, source, tmp_path / "cache", **options)


def test_no_image_can_be_read(tiny_vae, tmp_path):
    (tmp_path / "images").mkdir()
    for name in "ab":
        (tmp_path / "images" / f"{name}.png").write_bytes(b"hello")
    source = load_images(str(tmp_path / "images"), 32)
    for _ in range(2):
        text = refusal(cache_latents, tiny_vae, source, tmp_path / "cache", on_bad_image="skip")
        assert "none of the 2 images" in text and "a.png" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("moment", [0, 1])
def test_value_that_is_not_finite_names_the_image(tiny_vae, tiny_images, tmp_path, monkeypatch, value, moment):
    solid("RGB", WHITE, (32, 32)).save(tiny_images / "07.png")
    source = load_images(str(tiny_images), 32)

    def overflowing(vae, pixels):
        moments = encode_moments(vae, pixels)
        moments[moment][(pixels == 1).flatten(1).all(1), 2, 3, 3] = value
        return moments

    monkeypatch.setattr(caching, "encode_moments", overflowing)
    with pytest.raises(FloatingPointError, match="07.png") as caught:
        cache_latents(tiny_vae, source, tmp_path / "cache", batch_size=5, on_bad_image="skip")
    assert "\n" not in str(caught.value)
    assert not leftovers(tmp_path) and not list(tmp_path.rglob("*.safetensors"))


def test_draws_are_standardised(each_vae, source, tmp_path):
    cache = cache_latents(each_vae, source, tmp_path / "cache")
    z = cache.draw(4000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=0.03)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(4), rtol=0, atol=0.03)


def test_draw_is_a_function_of_the_generator(tiny_vae, source, tmp_path):
    cache = cache_latents(tiny_vae, source, tmp_path / "cache")
    first = cache.draw(6, torch.Generator().manual_seed(3))
    torch.manual_seed(1)
    torch.rand(5)
    assert torch.equal(first, cache.draw(6, torch.Generator().manual_seed(3)))
    assert not torch.equal(first, cache.draw(6, torch.Generator().manual_seed(4)))
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(first, cache.draw(6, generator))
    assert not torch.equal(first, cache.draw(6, generator))


def test_draws_reach_every_image_and_orientation(source, tmp_path):
    cache = cache_latents(frozen("AutoencoderDC"), source, tmp_path / "cache")
    z = standardise(cache.mean, cache.channel_mean, cache.channel_std).flatten(0, 1).flatten(1)
    drawn = cache.draw(400, torch.Generator().manual_seed(0)).flatten(1)
    nearest = torch.cdist(drawn, z, compute_mode="donot_use_mm_for_euclid_dist")
    assert nearest.min(1).values.max() < 1e-4
    assert set(nearest.argmin(1).tolist()) == set(range(24))


def test_manifest_is_plain(tiny_vae, source, tmp_path):
    cache_latents(tiny_vae, source, tmp_path / "cache")
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert manifest["num_pictures"] == 12 and manifest["resolution"] == 32 and manifest["horizontal_flip"] is True


def test_pixels_as_particles(tiny_images):
    source = load_images(str(tiny_images), 32)
    cache = cache_pixels(source, horizontal_flip=True)
    images = torch.stack([source[i] for i in range(len(source))])
    assert torch.equal(cache.images_uint8, images)
    pixels = images.double() / 127.5 - 1
    torch.testing.assert_close(cache.channel_mean.double(), pixels.mean((0, 2, 3)), atol=1e-6, rtol=0)
    torch.testing.assert_close(cache.channel_std.double(), pixels.std((0, 2, 3), correction=0), atol=1e-6, rtol=0)
    standard = ((pixels - pixels.mean((0, 2, 3), keepdim=True)) / pixels.std((0, 2, 3), keepdim=True)).float()
    draws = cache.draw(200, torch.Generator().manual_seed(0))
    plain, mirrored = (
        (draws[:, None] - z[None]).flatten(2).norm(dim=2).min(1).values < 0.2 for z in (standard, standard.flip(-1))
    )
    assert (plain | mirrored).all() and 60 < plain.sum() < 140
    assert torch.equal(cache.images_uint8, images)  # mirrored copies, not the images themselves


def test_pixels_of_a_bad_image(tiny_images):
    (tiny_images / "00.png").write_bytes(b"not an image")
    source = load_images(str(tiny_images), 32)
    with pytest.raises(DataError, match="00.png"):
        cache_pixels(source)
    cache = cache_pixels(source, on_bad_image="skip")
    assert len(cache) == 11 and cache.skipped[0].endswith("00.png")


# streams, and memory


@pytest.fixture
def parquet(tiny_images, tmp_path):
    cells = [{"bytes": p.read_bytes(), "path": None} for p in sorted(tiny_images.iterdir())]
    table = datasets.Dataset.from_dict({"image": cells}, datasets.Features({"image": datasets.Image(decode=False)}))
    table.to_parquet(tmp_path / "images.parquet")
    return str(tmp_path / "images.parquet")


@pytest.mark.parametrize("shard_size", [5, 6, 20])
def test_a_stream_is_encoded_like_its_table(tiny_vae, parquet, tmp_path, monkeypatch, shard_size):
    options = dict(shard_size=shard_size, batch_size=4)
    table = cache_latents(tiny_vae, load_images(parquet, 32), tmp_path / "table", **options)
    stream = cache_latents(tiny_vae, load_images(parquet, 32, streaming=True), tmp_path / "stream", **options)
    assert len(stream) == 12
    assert_equal_caches(table, stream)
    monkeypatch.setattr(caching, "encode_moments", None)  # read, not encoded
    again = cache_latents(tiny_vae, load_images(parquet, 32, streaming=True), tmp_path / "stream", **options)
    assert_equal_caches(stream, again)


def test_an_interrupted_stream_goes_on(tiny_vae, parquet, tmp_path, monkeypatch, encoded_batches):
    options = dict(shard_size=5, batch_size=5, horizontal_flip=False)
    whole = cache_latents(tiny_vae, load_images(parquet, 32, streaming=True), tmp_path / "whole", **options)
    encoded_batches.clear()
    counted = caching.encode_moments

    def interrupted(vae, pixels):
        if len(encoded_batches) == 2:
            raise KeyboardInterrupt
        return counted(vae, pixels)

    monkeypatch.setattr(caching, "encode_moments", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache_latents(tiny_vae, load_images(parquet, 32, streaming=True), tmp_path / "cache", **options)
    monkeypatch.setattr(caching, "encode_moments", counted)
    encoded_batches.clear()
    again = cache_latents(tiny_vae, load_images(parquet, 32, streaming=True), tmp_path / "cache", **options)
    assert encoded_batches == [2]
    assert_equal_caches(whole, again)


def test_a_stream_of_other_data_is_another_cache(tiny_vae, parquet, tmp_path):
    cache_latents(tiny_vae, load_images(parquet, 32, streaming=True), tmp_path / "cache")
    cells = {"image": [solid("RGB", RED, (32, 32))] * 12}
    datasets.Dataset.from_dict(cells, datasets.Features({"image": datasets.Image()})).to_parquet(parquet)
    stream = load_images(parquet, 32, streaming=True)
    assert "made with another data" in refusal(cache_latents, tiny_vae, stream, tmp_path / "cache")


def test_bad_images_of_a_stream_are_named(tiny_vae, tmp_path, tiny_images):
    cells = [{"bytes": p.read_bytes(), "path": None} for p in sorted(tiny_images.iterdir())]
    cells[3]["bytes"] = b"not an image"
    cells[7] = None
    path = str(tmp_path / "bad.parquet")
    datasets.Dataset.from_dict({"image": cells}, datasets.Features({"image": datasets.Image(decode=False)})).to_parquet(
        path
    )
    stream = load_images(path, 32, streaming=True)
    assert f"{path}[3]" in refusal(cache_latents, tiny_vae, stream, tmp_path / "cache")
    found = cache_latents(tiny_vae, load_images(path, 32, streaming=True), tmp_path / "cache", on_bad_image="skip")
    assert found.skipped == (f"{path}[3]", f"{path}[7]") and len(found) == 10
    assert stream.examples(8, 0, found.skipped).shape == (8, 3, 32, 32)
    assert len(cache_pixels(load_images(path, 32, streaming=True), on_bad_image="skip")) == 10


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_column": "photo"}, "no column 'photo'; it has image"),
        ({}, "no column 'image'; it has label"),
        ({"image_column": "label"}, "holds no images"),
    ],
)
def test_streams_without_images(parquet, tmp_path, options, message):
    if not options or options["image_column"] == "label":
        parquet = str(tmp_path / "labels.parquet")
        datasets.Dataset.from_dict({"label": [1, 2]}).to_parquet(parquet)
    assert message in refusal(load_images, parquet, 32, streaming=True, **options)


def test_draws_from_shards_are_those_from_one(tiny_vae, source, tmp_path):
    one, many = (cache_latents(tiny_vae, source, tmp_path / str(n), shard_size=n) for n in (12, 5))
    a, b = (cache.draw(50, torch.Generator().manual_seed(0)) for cache in (one, many))
    torch.testing.assert_close(a, b)
    expected = standardise(one.mean, one.channel_mean, one.channel_std)
    torch.testing.assert_close(many.channel_mean, one.mean.mean((0, 1, 3, 4)))
    variance = one.mean.double().var((0, 1, 3, 4), correction=0) + one.std.double().square().mean((0, 1, 3, 4))
    torch.testing.assert_close(many.channel_std, variance.sqrt().float())
    assert expected.shape == (12, 2, 4, 16, 16)


MEMORY = """
import resource, sys
import torch
from conftest import RED, WHITE, frozen, refusal, solid
from latent_dmmd.data.particles import cache_latents
from latent_dmmd.data.sources import load_images

source, folder, streaming = sys.argv[1:]
images = load_images(source, 8, streaming=streaming == "True")
cache = cache_latents(frozen("AutoencoderTiny"), images, folder, horizontal_flip=False, batch_size=64)
for step in range(20):
    cache.draw(64, torch.Generator().manual_seed(step))
print(len(cache), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def synthetic(kind, count, folder):
    """A folder or a table of `count` small images, all different."""
    folder.mkdir()
    if kind == "folder":
        for i in range(count):
            solid("RGB", (i % 256, i // 256 % 256, i // 65536), (8, 8)).save(folder / f"{i:06d}.png", compress_level=1)
        return str(folder)
    path = folder / "images.parquet"

    def cells():
        for i in range(count):
            file = BytesIO()
            solid("RGB", (i % 256, i // 256 % 256, i // 65536), (8, 8)).save(file, "PNG", compress_level=1)
            yield {"image": {"bytes": file.getvalue(), "path": None}}

    schema = pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()})})
    with pq.ParquetWriter(path, schema) as writer:
        rows = cells()
        while batch := list(itertools.islice(rows, 1000)):
            writer.write_table(pa.Table.from_pylist(batch, schema))
    return str(path)


@pytest.mark.parametrize("kind", ["folder", "stream"])
@pytest.mark.parametrize("counts", [(500, 4000), pytest.param((10_000, 100_000), marks=pytest.mark.long)])
def test_memory_does_not_grow_with_the_number_of_images(tmp_path, kind, counts):
    peaks = []
    for count in counts:
        source = synthetic(kind, count, tmp_path / f"{kind}-{count}")
        result = run(MEMORY, source, tmp_path / f"cache-{count}", kind == "stream")
        assert result.returncode == 0, result.stderr
        output = result.stdout.split()
        assert int(output[0]) == count
        peaks.append(int(output[1]))
    assert peaks[1] < 1.1 * peaks[0], f"{peaks} KB"
