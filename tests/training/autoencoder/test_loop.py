"""Training of an autoencoder: what it starts from, what it refuses, what it leaves."""

import json
import os
import shutil
import signal
from pathlib import Path

import datasets
import diffusers
import pytest
import torch
from conftest import BUILDERS, CALLERS, frozen, metrics
from PIL import Image
from safetensors.torch import load_file

from latent_dmmd.apps.info import describe_folder
from latent_dmmd.commands import evaluate_autoencoder
from latent_dmmd.commands.train_autoencoder import main
from latent_dmmd.data.autoencoder import BUNDLED_AUTOENCODER, encode_moments, load_autoencoder
from latent_dmmd.data.pixels import validation_indices
from latent_dmmd.metrics.autoencoders import psnr_of
from latent_dmmd.nn.autoencoder import build_autoencoder
from latent_dmmd.training.autoencoder import AutoencoderTrainingConfig, loop, train_autoencoder
from latent_dmmd.training.autoencoder.card import save_autoencoder
from latent_dmmd.training.autoencoder.config import CropDataConfig
from latent_dmmd.training.autoencoder.loop import load_training_images
from latent_dmmd.training.autoencoder.trainer import AutoencoderTrainer
from latent_dmmd.training.config import parse_config
from latent_dmmd.utils.errors import ConfigError, DataError
from latent_dmmd.utils.process import AUTO_PRECISION

NOT_UTF8 = os.fsdecode(b"caf\xe9")
SMALL = dict(latent_channels=4, width=8, downsampling=8)
NO_NETWORK = dict(perceptual_weight=0.0, pooled_weight=0.0)


@pytest.fixture(autouse=True)
def no_scorer(monkeypatch):
    """The early look for the network that scores, which takes a fifth of a second."""
    monkeypatch.setattr(loop, "load_extractor", lambda: None)


@pytest.fixture
def config(tiny_images, tmp_path):
    """A configuration of four steps on twelve images."""

    def build(run="run", data=None, **options):
        data = dict(name_or_path=str(tiny_images), resolution=32, cache_dir=str(tmp_path / "cache")) | (data or {})
        how = dict(num_steps=4, batch_size=2, crop_size=16, checkpointing_steps=2, mixed_precision="no", **NO_NETWORK)
        sizes = {} if options.get("init_from") else SMALL
        return AutoencoderTrainingConfig(str(tmp_path / run), CropDataConfig(**data), **{**how, **sizes, **options})

    return build


def saved(class_name, folder):
    frozen(class_name).save_pretrained(folder)
    return str(folder)


def test_the_bundled_weights_are_of_the_architecture_that_is_built():
    bundled, built = load_autoencoder(BUNDLED_AUTOENCODER), build_autoencoder()
    shapes = [{name: w.shape for name, w in vae.state_dict().items()} for vae in (bundled, built)]
    assert shapes[0] == shapes[1]
    configs = [{**json.loads(vae.to_json_string()), "_name_or_path": None} for vae in (bundled, built)]
    assert configs[0] == configs[1]
    assert encode_moments(bundled, torch.zeros(1, 3, 256, 256))[0].shape == (1, 8, 16, 16)
    default = AutoencoderTrainingConfig()
    assert (default.latent_channels, default.width, default.downsampling) == (8, 32, 16)


@pytest.mark.parametrize("latent_channels", [1, 16, 32])
@pytest.mark.parametrize("downsampling", [8, 16])
def test_sizes_of_latents(latent_channels, downsampling):
    vae = build_autoencoder(latent_channels, 8, downsampling)
    latents = vae.encode(torch.zeros(1, 3, 32, 64)).latent
    assert latents.shape == (1, latent_channels, 32 // downsampling, 64 // downsampling)
    assert vae.decode(latents).sample.shape == (1, 3, 32, 64)


@pytest.mark.parametrize("adversarial_weight", [0.0, 0.1])
def test_stopped_and_resumed_is_as_in_one_go(config, monkeypatch, adversarial_weight):
    """Bit by bit: weights, averages, optimisers, discriminator, figures and what is saved."""
    options = dict(adversarial_weight=adversarial_weight, adversarial_start=1)
    whole, broken = config("whole", **options), config("broken", **options)
    train_autoencoder(whole)

    step = AutoencoderTrainer.step

    def stop_after_three(self, number, images):
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number, images)

    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderTrainer, "step", stop_after_three)
        with pytest.raises(SystemExit):
            train_autoencoder(broken)
    train_autoencoder(broken)

    folders = [Path(c.output_dir) for c in (whole, broken)]
    for name in ("model", "model_1", "averages"):
        first, second = (load_file(folder / "checkpoint-4" / f"{name}.safetensors") for folder in folders)
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    for name in ("optimizer.bin", "optimizer_1.bin"):
        assert len({(folder / "checkpoint-4" / name).read_bytes() for folder in folders}) == 1
    biases = [load_file(folders[0] / f"checkpoint-{step}" / "model_1.safetensors")["0.bias"] for step in (2, 4)]
    assert torch.equal(*biases) == (adversarial_weight == 0)
    last = [metrics(folder)[-1] for folder in folders]
    assert last[0] == last[1] and ("discriminator" in last[0]) == (adversarial_weight > 0)
    assert last[0]["step"] == 4 and [line["step"] for line in metrics(folders[1])] == [2, 3, 4]
    saved_files = [load_file(f / "autoencoder" / "diffusion_pytorch_model.safetensors") for f in folders]
    assert all(torch.equal(saved_files[0][key], saved_files[1][key]) for key in saved_files[0])


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_what_is_saved_does_not_depend_on_what_the_caller_has_set(config, caller, precision):
    how = dict(mixed_precision=precision, learning_rate=1e-2)
    alone = train_autoencoder(config("alone", **how))
    with CALLERS[caller]():
        inside = train_autoencoder(config("inside", **how))
    saved = [load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (alone, inside)]
    assert all(torch.equal(weight, saved[1][name]) for name, weight in saved[0].items())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_auto_trains_in_the_precision_that_it_names(config, precision, monkeypatch, capsys):
    assert AutoencoderTrainingConfig().mixed_precision == "auto"
    monkeypatch.setenv(AUTO_PRECISION, precision)
    folders = [train_autoencoder(config(how, mixed_precision=how, learning_rate=1e-2)) for how in ("auto", precision)]
    assert capsys.readouterr().out.startswith(f"mixed precision: {precision} (by {AUTO_PRECISION})\n")
    ours, theirs = (load_file(folder / "diffusion_pytorch_model.safetensors") for folder in folders)
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


@pytest.mark.parametrize("class_name", BUILDERS)
@pytest.mark.parametrize("trains", ["both", "decoder"])
def test_fine_tuning_keeps_the_class_and_with_the_decoder_alone_the_latents(config, tmp_path, class_name, trains):
    start = saved(class_name, tmp_path / "start")
    folder = train_autoencoder(config(init_from=start, trains=trains, learning_rate=1e-2))
    before, after = load_autoencoder(start), load_autoencoder(str(folder))
    assert type(after).__name__ == class_name
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    for ours, theirs in zip(encode_moments(before, pixels), encode_moments(after, pixels)):
        assert torch.equal(ours, theirs) == (trains == "decoder" or not ours.any())
    changed = [n for n, w in after.state_dict().items() if not torch.equal(w, before.state_dict()[n].half().float())]
    assert any(name.startswith("decoder.") for name in changed)
    assert getattr(diffusers, class_name).from_pretrained(folder).config.latent_channels == 4


def test_weights_are_float16_unless_that_would_move_latents_that_stay(config, tmp_path):
    def dtypes(folder):
        return {w.dtype for w in load_file(folder / "diffusion_pytorch_model.safetensors").values()}

    start = saved("AutoencoderDC", tmp_path / "start")
    frozen("AutoencoderDC").half().save_pretrained(tmp_path / "half")
    assert dtypes(train_autoencoder(config("a"))) == {torch.float16}
    assert dtypes(train_autoencoder(config("b", init_from=start))) == {torch.float16}
    decoder = dict(trains="decoder")
    assert dtypes(train_autoencoder(config("c", init_from=start, **decoder))) == {torch.float32}
    half = str(tmp_path / "half")
    assert dtypes(train_autoencoder(config("d", init_from=half, **decoder))) == {torch.float16}


def test_a_tenth_is_not_trained_on(config):
    images = load_training_images(config())
    assert len(images.training) == 11 and len(images.validation) == 1
    training = torch.stack([images.training[i] for i in range(11)])
    assert not (training == images.validation[0]).flatten(1).all(1).any()
    assert torch.equal(images.measured(), load_training_images(config()).measured())


def test_other_images_validate(config, tiny_images, tmp_path):
    others = tmp_path / "others"
    others.mkdir()
    for name in ("00.png", "01.png"):
        (tiny_images / name).rename(others / name)
    images = load_training_images(config(validation=str(others)))
    assert len(images.training) == 10 and len(images.validation) == 2
    shutil.copy(others / "00.png", tiny_images / "00.png")
    assert len(load_training_images(config(validation=str(others), data=dict(cache_dir=None))).training) == 11
    (tmp_path / "link").symlink_to(tiny_images)
    for same in (tiny_images, f"{tiny_images.parent}/./images", tmp_path / "link"):
        with pytest.raises(DataError, match="11 of the images of validation .* give images that are not trained on"):
            load_training_images(config(validation=str(same)))


def test_a_table_under_two_names_is_one(config, tiny_images, tmp_path):
    rows = {"image": [{"bytes": path.read_bytes()} for path in sorted(tiny_images.iterdir())]}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(image=datasets.Image()))
    table.to_parquet(str(tmp_path / "table.parquet"))
    data = dict(name_or_path=str(tmp_path / "table.parquet"))
    with pytest.raises(DataError, match="12 of the images of validation .* give images that are not trained on"):
        load_training_images(config(data=data, validation=f"{tmp_path}/table.parquet:train"))


def test_a_resumed_run_validates_on_what_it_was_not_trained_on(config, tiny_images):
    options = config(data=dict(cache_dir=None))
    folder = train_autoencoder(options)
    held_out = json.loads((folder.parent / "validation.json").read_text())
    card = (folder / "README.md").read_bytes()
    assert held_out == [f"{validation_indices(12)[0]:02d}.png"]
    shutil.copy(tiny_images / "00.png", tiny_images / "12.png")  # drawn among thirteen, it is another
    assert [f"{i:02d}.png" for i in validation_indices(13)] != held_out
    text = refusal(lambda: config(data=dict(cache_dir=None)))
    assert "have changed since" in text and "choose another --output_dir" in text
    assert json.loads((folder.parent / "validation.json").read_text()) == held_out
    assert (folder / "README.md").read_bytes() == card
    (tiny_images / "12.png").unlink()
    assert train_autoencoder(options) == folder


@pytest.mark.parametrize("count, message", [(1, "the one image of .* is for validation"), (2, "--batch_size 1$")])
def test_too_few_images_are_told_apart(config, tiny_images, count, message):
    for path in sorted(tiny_images.iterdir())[count:]:
        path.unlink()
    with pytest.raises(DataError, match=message):
        train_autoencoder(config())


@pytest.mark.parametrize("count", [1, 2])
def test_one_image_is_enough_if_others_validate(config, tiny_images, tmp_path, count):
    others = tmp_path / "others"
    others.mkdir()
    for path in sorted(tiny_images.iterdir())[count:]:
        path.rename(others / path.name)
    folder = train_autoencoder(config(validation=str(others), batch_size=1, num_steps=1))
    assert f"{12 - count} images" in (folder / "README.md").read_text()


def test_checkpoints_measure_the_averaged_weights(config):
    options = config(num_steps=2)
    folder = Path(options.output_dir)
    train_autoencoder(options)
    line = metrics(folder)[-1]
    assert {"l1", "squared", "latent", "psnr"} < line.keys()
    averaged = build_autoencoder(**SMALL).eval()
    averaged.load_state_dict(load_file(folder / "checkpoint-2" / "averages.safetensors"))
    measured = load_training_images(options).measured()
    assert line["psnr"] == pytest.approx(psnr_of(averaged, measured), abs=1e-3)
    assert Image.open(folder / "reconstructions.png").size == (32, 2 * (32 + 18))


def test_figures_of_the_card_are_those_of_its_command(config, tmp_path, monkeypatch, capsys):
    folder = train_autoencoder(config(num_steps=1))
    capsys.readouterr()
    card = (folder / "README.md").read_text()
    command = card.split("```sh\nlatent-dmmd evaluate-autoencoder ")[1].split("\n")[0]
    evaluate_autoencoder.main(command.split())
    printed = capsys.readouterr().out
    rows = [line.strip(" |").split(" | ") for line in card.split("|---|---|\n")[1].split("\n\n")[0].splitlines()]
    assert rows[0][0] == "PSNR" and "n = 1" in rows[0][1]
    for what, figure in rows:
        assert f"  {what:<44}{figure}\n" in printed


def test_nothing_is_saved_that_could_not_be_measured(config, tmp_path):
    vae = build_autoencoder(**SMALL)
    with torch.no_grad():
        vae.decoder.conv_out.conv.weight.fill_(1e6)  # infinite in float16
    validation = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8)
    with pytest.raises(FloatingPointError, match="reconstructions are not finite"):
        save_autoencoder(vae, config(), tmp_path / "autoencoder", validation, 11)
    assert not [p for p in tmp_path.iterdir() if "autoencoder" in p.name]


def refusal(build, error=(ConfigError, DataError)):
    with pytest.raises(error) as caught:
        train_autoencoder(build())
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(crop_size=20), "crop_size must be a positive multiple of 8; got 20"),
        (dict(crop_size=24, equivariance_weight=1.0), "crop_size must be a positive multiple of 16, twice"),
        (dict(crop_size=40), "crop_size=40 exceeds data.resolution=32"),
        (dict(data=dict(resolution=36)), "data.resolution must be a multiple of the downsampling, 8; got 36"),
        (dict(downsampling=32), "downsampling must be 8 or 16; got 32"),
        (dict(width=12), "width must be a multiple of 8 from 8 to 256; got 12"),
        (dict(width=512), "width must be a multiple of 8 from 8 to 256; got 512"),
        (dict(latent_channels=5), "latent_channels must divide 4 .* width = 32; got 5"),
        (dict(latent_channels=0), "latent_channels must divide"),
        (dict(data=dict(streaming=True)), "data.streaming does not apply"),
        (dict(data=dict(class_conditional=True)), "data.class_conditional does not apply"),
        (dict(perceptual_networks=["lite0"]), "lite0 scores the images"),
        (dict(perceptual_networks=["vgg"]), "perceptual_networks must be lite1 or lite2"),
        (dict(perceptual_networks=[]), "perceptual_networks must be lite1 or lite2"),
        (dict(trains="decoder"), "trains=decoder needs init_from"),
        (dict(init_from="x", width=16, latent_channels=4), "latent_channels, width: the architecture is that of init"),
        (dict(init_from="x", trains="decoder", latent_weight=0.1), "latent_weight has nothing to pull at"),
        (dict(init_from="nowhere"), "init_from: no autoencoder at 'nowhere'"),
        (dict(batch_size=12), "batch_size=12 exceeds the 11 images of .* give more, or --batch_size 11"),
        (dict(batch_size=0), "batch_size must be positive"),
        (dict(batch_size=1, crop_size=8), "a batch is one latent, which has no deviation"),
        (dict(gradient_weight=float("nan")), "gradient_weight must be finite"),
        (dict(squared_weight=-1.0), "squared_weight must be finite and not negative"),
        (dict(noise_kind="interpolate", latent_noise=1.5), "latent_noise must be at most 1"),
        (dict(ema_decay=1.0), "ema_decay must be in"),
        (dict(seed=-1), "seed must not be negative"),
        (dict(run="images/run"), "output_dir .* lies in data.name_or_path"),
        (dict(run="images/run", data=dict(name_or_path="x"), validation="images"), "output_dir .* lies in validation"),
        (dict(data=dict(cache_dir="run/cache")), "data.cache_dir .* lies in output_dir"),
        (dict(data=dict(cache_dir="run")), "data.cache_dir .* lies in output_dir"),
        (dict(data=dict(cache_dir="images/00.png")), "images/00.png is a file; pass another --data.cache_dir"),
        (dict(data=dict(cache_dir=NOT_UTF8)), r"caf\\xe9 is not UTF-8; pass another --data.cache_dir"),
        (dict(run=NOT_UTF8), r"output_dir .*caf\\xe9 is not UTF-8; choose another --output_dir"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value),
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(config, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ConfigError, DataError), match=message):
        train_autoencoder(config(**options))
    assert refusal(lambda: config(**options))
    assert not (tmp_path / options.get("run", "run")).exists()


@pytest.mark.parametrize("class_name", BUILDERS)
def test_an_autoencoder_that_is_not_finite_is_refused(config, tmp_path, class_name):
    vae = frozen(class_name)
    next(vae.encoder.parameters()).fill_(float("nan"))
    vae.save_pretrained(tmp_path / "start")
    message = refusal(lambda: config(init_from=str(tmp_path / "start")))
    assert "start: the autoencoder's latents are not finite" in message and not (tmp_path / "run").exists()


def test_images_of_one_colour_are_refused(config, tiny_images, tmp_path):
    for i, path in enumerate(sorted(tiny_images.iterdir())):
        Image.new("RGB", (32, 32), (20 * i, 0, 255)).save(path)
    assert "all 12 images of" in refusal(config) and "are of one colour each" in refusal(config)
    assert not (tmp_path / "run").exists()


def test_bad_images_are_named_or_skipped_as_by_the_main_job(config, tiny_images, tmp_path):
    (tiny_images / "03.png").write_bytes(b"no image")
    assert "03.png: not an image; pass --data.on_bad_image skip" in refusal(config)
    assert not (tmp_path / "run").exists()
    images = load_training_images(config(data=dict(on_bad_image="skip")))
    assert len(images.training) == 10 and [name.endswith("03.png") for name in images.skipped] == [True]


def test_a_run_folder_of_other_settings_is_refused(config):
    train_autoencoder(config(num_steps=1))
    assert "learning_rate 0.5 (was 0.001)" in refusal(lambda: config(num_steps=1, learning_rate=0.5))
    train_autoencoder(config(num_steps=1, checkpointing_steps=5))


def test_the_command_says_what_is_next(config, tiny_images, tmp_path, capsys):
    keys = dict(num_steps=1, batch_size=2, crop_size=16, mixed_precision="no", **NO_NETWORK, **SMALL)
    words = [f"--data.name_or_path={tiny_images}", f"--data.cache_dir={tmp_path / 'cache'}", "--data.resolution=32"]
    words += [
        f"--output_dir={tmp_path / 'run'}",
        "--data.on_bad_image=skip",
        *(f"--{name}={value}" for name, value in keys.items()),
    ]
    main(words)
    out = capsys.readouterr().out
    assert f"autoencoder: {tmp_path / 'run' / 'autoencoder'}\n" in out and "data: 12 images" in out
    read = f"--data.name_or_path {tiny_images} --data.resolution 32 --data.on_bad_image skip"
    assert f"latent-dmmd train {read} --autoencoder.name_or_path" in out
    assert f"latent-dmmd train {read} --autoencoder.name_or_path" in describe_folder(tmp_path / "run")
    with pytest.raises(ConfigError, match="no such key: data.horizontal_flips; did you mean data.horizontal_flip"):
        parse_config(AutoencoderTrainingConfig, ["--data.horizontal_flips", "true"])


def test_the_room_names_what_trains_and_its_configuration():
    from latent_dmmd.training import autoencoder

    assert autoencoder.train_autoencoder is loop.train_autoencoder and {*autoencoder.__all__} <= {*dir(autoencoder)}
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        autoencoder.train  # noqa: B018
