"""What a run says of the images before it encodes them, and that it goes on as it would without."""

import math
import shlex
import shutil

import datasets
import numpy as np
import pytest
import torch
from conftest import frozen, metrics, refusal, solid, weights
from safetensors.torch import load_file

from latent_dmmd.data.autoencoder import decode_pixels, encode_moments, load_autoencoder, psnr
from latent_dmmd.data.sources import load_images
from latent_dmmd.training import first_look, loop
from latent_dmmd.training.autoencoder.config import AutoencoderTrainingConfig
from latent_dmmd.training.config import Config, parse_config
from latent_dmmd.training.loop import train
from latent_dmmd.utils.images import to_pixels

NOTE = "note: below 24 dB these images are outside what the autoencoder knows; to train one on them: "


@pytest.fixture
def say(arguments):
    """The lines of the tiny run with further keys."""

    def say(*extra):
        config = parse_config(Config, [*arguments, *extra])
        data, name = config.data, config.autoencoder.name_or_path
        source = load_images(data.name_or_path, data.resolution, data.image_column, data.streaming)
        return first_look.first_look(load_autoencoder(name) if name else None, source, config)[0]

    return say


def printed(capsys):
    """What a run printed of the images and the autoencoder."""
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if line.startswith(("data: ", "autoencoder: ", NOTE))]


def perfect(monkeypatch, error=0.0):
    """Reconstructions that are the images, but for an error of every pixel."""
    monkeypatch.setattr(first_look, "encode_moments", lambda vae, pixels: (pixels, torch.zeros_like(pixels)))
    monkeypatch.setattr(first_look, "decode_pixels", lambda vae, latents: latents * (1 - error))


def saved(folder, images):
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        image.save(folder / f"{i:02d}.png")
    return folder


def test_psnr_of_every_image():
    pixels = torch.rand(3, 3, 8, 8) - 0.5
    values = psnr(pixels + torch.tensor([0.2, -0.02, 0.0]).view(3, 1, 1, 1), pixels)
    assert values.tolist() == pytest.approx([20.0, 40.0, 10 * math.log10(12 * 255**2)], abs=1e-3)
    assert psnr(torch.full((1, 3, 8, 8), 9.0), torch.ones(1, 3, 8, 8)).item() == pytest.approx(58.9, abs=0.1)


def test_the_fit_is_the_mean_over_images(each_vae, tiny_images):
    source = load_images(str(tiny_images), 32)
    fit = first_look.autoencoder_fit(each_vae, first_look.spread_images(source, "error"))
    pixels = to_pixels(torch.stack(list(source)))
    errors = (decode_pixels(each_vae, encode_moments(each_vae, pixels)[0]).clamp(-1, 1) - pixels).square()
    assert fit.psnr == pytest.approx((10 * (4 / errors.mean((1, 2, 3))).log10()).mean().item(), rel=1e-4)
    assert fit.num_images == 12


@pytest.mark.parametrize("count, chosen", [(5, range(5)), (16, range(16)), (31, None), (64, range(0, 64, 4))])
def test_images_are_spread_over_the_data(tmp_path, count, chosen):
    saved(tmp_path / "images", [solid("L", i) for i in range(count)])
    images = first_look.spread_images(load_images(str(tmp_path / "images"), 8), "error")
    found = [int(image[0, 0, 0]) for image in images.values()]
    if chosen is None:
        assert len(set(found)) == 16 and found[0] == 0 and set(np.diff(found)) == {1, 2}
    else:
        assert found == list(chosen)


def test_a_fit_that_is_low_names_the_command(say, workshop, tiny_images):
    fit, note = say()
    assert fit.startswith("autoencoder: PSNR ") and fit.endswith(" dB, mean over 12 images")
    words = (
        f"latent-dmmd train-autoencoder --data.name_or_path {workshop / 'images'} --data.resolution 32 --crop_size 32"
    )
    assert note == f"{NOTE}{words} --output_dir runs/autoencoder"
    folder = tiny_images.parent / "Anna's photos; 2024"
    shutil.copytree(tiny_images, folder)
    command = say("--data.name_or_path", str(folder), "--data.on_bad_image", "skip")[1].removeprefix(NOTE)
    arguments = shlex.split(command)
    config = parse_config(AutoencoderTrainingConfig, arguments[2:])
    assert arguments[:2] == ["latent-dmmd", "train-autoencoder"] and config.data.on_bad_image == "skip"
    assert (config.data.name_or_path, config.data.resolution) == (str(folder), 32)


def test_a_bundled_autoencoder_that_knows_the_images_is_named():
    config = parse_config(Config, ["--data.name_or_path", "openmoji:fit"])
    assert first_look.advice(config) == "one that knows them: --autoencoder.name_or_path openmoji-vae"
    for words in (["--data.name_or_path", "openmoji", "--autoencoder.name_or_path", "openmoji-vae"], []):
        assert first_look.advice(parse_config(Config, words)).startswith(
            "to train one on them: latent-dmmd train-autoencoder"
        )


@pytest.mark.parametrize("error, low", [(0.0, False), (0.05, False), (0.5, True)])
def test_only_a_low_fit_is_noted(say, monkeypatch, error, low):
    perfect(monkeypatch, error)
    assert any(line.startswith(NOTE) for line in say()) == low


def test_pixels_have_no_autoencoder(say):
    assert say("--autoencoder.name_or_path", "null", "--feature_net.patch_size", "16") == []


def test_run_dry_run_and_card_say_the_same(arguments, tmp_path, capsys):
    folder = train(parse_config(Config, arguments))
    lines = printed(capsys)
    assert [line.split(":")[0] for line in lines] == ["data", "autoencoder", "note"]
    assert lines[1].removeprefix("autoencoder: ") in (folder / "pipeline" / "README.md").read_text()
    train(parse_config(Config, [*arguments, "--dry_run"]))
    assert printed(capsys) == lines


def test_the_run_is_the_same_without_it(arguments, trained_once, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "first_look", lambda *given: ([], None))
    cache = tmp_path / "cache"
    options = ["--data.cache_dir", str(cache), "--output_dir", str(tmp_path / "without")]
    without = train(parse_config(Config, [*arguments, *options]))
    assert metrics(without) == metrics(trained_once)
    assert all(torch.equal(a, b) for a, b in zip(weights(without).values(), weights(trained_once).values()))
    whole = trained_once.parent / "cache"
    (shard,) = cache.glob("*.safetensors")
    for (name, a), b in zip(load_file(shard).items(), load_file(whole / shard.name).values()):
        assert torch.equal(a, b), name


def test_nothing_is_drawn(workshop, arguments, tiny_vae):
    config = parse_config(Config, arguments)
    source = load_images(str(workshop / "images"), 32)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first_look.first_look(tiny_vae, source, config)
    assert torch.equal(torch_state, torch.get_rng_state()) and (numpy_state == np.random.get_state()[1]).all()


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_values_that_are_not_finite_are_named_and_nothing_is_written(arguments, workshop, tmp_path, part):
    vae = frozen("AutoencoderKL")
    parameter = next(getattr(vae, part).parameters())
    parameter.data.fill_(float("nan"))
    vae.save_pretrained(tmp_path / "vae")
    options = ["--autoencoder.name_or_path", str(tmp_path / "vae"), "--data.cache_dir", str(tmp_path / "cache")]
    with pytest.raises(FloatingPointError, match="not finite for .*00.png; use it in float32"):
        train(parse_config(Config, [*arguments, *options]))
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_a_stream(say, tiny_images, tmp_path):
    table = datasets.Dataset.from_dict({"image": [str(p) for p in sorted(tiny_images.iterdir())] * 2})
    table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "images.parquet")
    fit, note = say("--data.name_or_path", str(tmp_path / "images.parquet"), "--data.streaming")
    assert fit.endswith("mean over 16 images") and str(tmp_path / "images.parquet") in note


def test_bad_images_are_named_or_left_out(say, tiny_images):
    data = ["--data.name_or_path", str(tiny_images)]
    for path in sorted(tiny_images.iterdir())[3:9]:
        path.write_bytes(b"not an image")
    assert "03.png: not an image; pass --data.on_bad_image skip" in refusal(say, *data)
    assert say(*data, "--data.on_bad_image", "skip")[0].endswith("mean over 6 images")
    for path in tiny_images.iterdir():
        path.write_bytes(b"not an image")
    assert say(*data, "--data.on_bad_image", "skip") == [
        "note: none of the images that were looked at first can be read"
    ]


@pytest.mark.parametrize("autoencoder", [[], ["--autoencoder.name_or_path", "null", "--feature_net.patch_size", "16"]])
@pytest.mark.parametrize("image", [solid("RGB", (200, 30, 60)), solid("RGBA", (0, 0, 0, 0))], ids=lambda i: i.mode)
def test_a_folder_of_one_colour(arguments, tmp_path, image, autoencoder):
    folder = saved(tmp_path / "images", [image] * 20)
    options = [
        *arguments,
        "--data.name_or_path",
        str(folder),
        "--data.cache_dir",
        str(tmp_path / "cache"),
        *autoencoder,
    ]
    text = refusal(train, parse_config(Config, options))
    color = "[200, 30, 60]" if image.mode == "RGB" else "[255, 255, 255]"
    assert f"all images of {folder} are of one colour, RGB {color}" in text
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_colours_that_differ_are_data(say, tmp_path):
    """Images of one colour each, and one image apart from the rest that is not among the sixteen."""
    each = saved(tmp_path / "each", [solid("L", 40 * i) for i in range(6)])
    assert say("--data.name_or_path", str(each))[0].endswith("mean over 6 images")
    odd = [solid("L", 255 if i == 1 else 0) for i in range(40)]
    assert say("--data.name_or_path", str(saved(tmp_path / "odd", odd)))[0].endswith("mean over 16 images")


def test_fewer_images_than_a_batch(say, arguments, tiny_images, tmp_path):
    for path in sorted(tiny_images.iterdir())[3:]:
        path.unlink()
    data = ["--data.name_or_path", str(tiny_images)]
    assert say(*data)[0] == "note: 3 images for training.pairs_per_level=4: every batch holds some of them twice"
    train(parse_config(Config, [*arguments, *data, "--data.cache_dir", str(tmp_path / "cache"), "--dry_run"]))
