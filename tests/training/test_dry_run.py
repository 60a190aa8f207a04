"""--dry_run says what a run would do and need, refuses what the run would refuse, and writes nothing."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from latent_dmmd.objective import WitnessMatching
from latent_dmmd.training import dry_run as module
from latent_dmmd.training.config import Config, parse_config
from latent_dmmd.training.differences import differing_keys
from latent_dmmd.training.dry_run import duration
from latent_dmmd.training.loop import train

DRY = "--dry_run"


@pytest.fixture
def plan(arguments, workshop, capsys, monkeypatch, tmp_path):
    """The lines of a dry run by their names; every file and folder around it stays as it was."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))

    def everything():
        roots = (workshop, tmp_path)
        return {p: p.stat().st_mtime_ns for root in roots for p in root.rglob("*")}

    def plan(*extra, given=arguments):
        before = everything()
        folder = train(parse_config(Config, [*given, *extra, DRY]))
        assert everything() == before and folder == tmp_path / "run"
        first, *lines = capsys.readouterr().out.strip().splitlines()
        assert first == "dry run: nothing is written"
        return dict(re.split(r": +", line, maxsplit=1) for line in lines)

    return plan


def test_a_first_run(plan, tmp_path, monkeypatch, workshop):
    assert not (tmp_path / "run").exists()
    lines = plan("--data.cache_dir", "null")
    assert lines["data"] == f"12 images of {workshop / 'images'}" and lines["images"] == "the first can be read"
    assert lines["particles"] == "4 × 16 × 16, latents, finite"
    assert lines["encoding"].startswith("12 images of ") and lines["encoding"].endswith("s")
    assert str(tmp_path / "home" / "latent_dmmd") in lines["cache"]
    assert lines["network"].endswith("parameters (EncoderFeatureNet)")
    assert re.fullmatch(r"6 steps of [\d.e-]+ s, about \d+ s", lines["training"])
    assert re.fullmatch(r"[\d,]+ MB", lines["peak memory"])
    assert "(2 + 1 checkpoints of 0 MB, pipeline)" in lines["run folder"]
    assert lines["would"] == f"start at step 0 in {tmp_path / 'run'}"


def test_the_size_of_a_checkpoint(arguments, trained, monkeypatch):
    """Of the files that the run wrote, some with headers; tensors are all that is counted."""
    sizes, original = [], module.checkpoint_mb
    monkeypatch.setattr(module, "checkpoint_mb", lambda trainer: sizes.append(original(trainer)) or 0)
    train(parse_config(Config, [*arguments, DRY]))
    files = json.loads((trained / "checkpoint-6" / "complete.json").read_text())
    names = ("model.safetensors", "optimizer.bin", "averages.safetensors")
    assert sizes[0] == pytest.approx(sum(files[name] for name in names) / 2**20, rel=0.5)


@pytest.mark.parametrize("left", [3, 0])
def test_a_run_that_was_begun(plan, trained, workshop, left):
    if left:
        shutil.rmtree(trained / "checkpoint-6")
    lines = plan()
    assert lines["encoding"] == f"none: all latents are in {workshop / 'cache'}"
    if left:
        assert lines["would"] == f"resume from {trained / 'checkpoint-3'}, at step 3 of 6"
        assert lines["training"].startswith("3 steps")
    else:
        assert lines["would"].startswith(f"make pipeline and images again from {trained / 'checkpoint-6'}: all 6")


@pytest.mark.parametrize(
    "extra",
    [
        ["--objective.name", "mmd-gan"],
        ["--autoencoder.name_or_path", "null", "--feature_net.patch_size", "16"],
        ["--data.horizontal_flip", "true", "--data.cache_dir", "null"],
    ],
    ids=" ".join,
)
def test_every_kind_of_run(plan, plain_arguments, extra):
    lines = plan(*extra, given=plain_arguments)
    assert lines["particles"].endswith("pixels, finite") == ("null" == extra[1])


def test_classes(plan, workshop, tmp_path):
    for i, path in enumerate(sorted((workshop / "images").iterdir())):
        folder = tmp_path / "classes" / str(i)
        folder.mkdir(parents=True)
        shutil.copy(path, folder)
    lines = plan(
        "--data.name_or_path", str(tmp_path / "classes"), "--data.class_conditional", "--data.cache_dir", "null"
    )
    assert lines["data"].startswith("12 images")


def test_images_that_cannot_be_read(plan, tiny_images):
    data = ["--data.name_or_path", str(tiny_images), "--data.cache_dir", "null"]
    for path in sorted(tiny_images.iterdir())[:9]:
        path.write_bytes(b"not an image")
    with pytest.raises(ValueError, match="00.png.*data.on_bad_image skip"):
        plan(*data)
    assert plan(*data, "--data.on_bad_image", "skip")["particles"].endswith("finite")
    for path in tiny_images.iterdir():
        path.write_bytes(b"not an image")
    with pytest.raises(ValueError, match="none of the 12 images could be read"):
        plan(*data, "--data.on_bad_image", "skip")


@pytest.mark.parametrize(
    "extra",
    [
        ["--data.name_or_path", "/nowhere/at/all"],
        ["--autoencoder.name_or_path", "/nowhere/at/all"],
        ["--data.resolution", "1"],
        ["--resume_from_checkpoint", "/nowhere/at/all"],
        ["--feature_net.patch_size", "7"],
        ["--training.seed", "5"],
        ["--data.horizontal_flip"],
        ["--data.class_conditional", "true"],
        ["--training.init_from", "/nowhere/at/all"],
        ["--objective.name", "one-step", "--objective.teacher", "/nowhere/at/all"],
    ],
    ids=" ".join,
)
def test_what_the_run_refuses_is_refused_by_the_same_line(plain_arguments, arguments, request, extra):
    given = plain_arguments if "one-step" in extra else arguments
    if "--training.seed" in extra:
        request.getfixturevalue("trained")
    if "--data.horizontal_flip" in extra:
        request.getfixturevalue("trained_once")  # whose cache is of something else
    texts = []
    for dry in ([], [DRY]):
        with pytest.raises(ValueError) as caught:
            train(parse_config(Config, [*given, *extra, *dry]))
        texts.append(str(caught.value))
    assert texts[0] == texts[1] and "\n" not in texts[0]


def test_a_loss_that_is_not_finite(arguments, monkeypatch):
    original = WitnessMatching.forward

    def poisoned(self, batch):
        terms = original(self, batch)
        return terms._replace(total=terms.total * torch.tensor(float("nan")))

    monkeypatch.setattr(WitnessMatching, "forward", poisoned)
    with pytest.raises(FloatingPointError, match="step 0"):
        train(parse_config(Config, [*arguments, DRY]))


@pytest.mark.parametrize("key", ["--output_dir", "--data.cache_dir"])
def test_too_little_room(arguments, tmp_path, key, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    full = tmp_path / "full"
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage if Path(path) == full else real(path))
    full.mkdir()
    with pytest.raises(
        OSError, match=f"cannot write {full / 'new'}: needs 0 MB, 0 MB are free; pass another {key[2:]}"
    ):
        train(parse_config(Config, [*arguments, key, str(full / "new"), DRY]))


def test_a_dry_run_is_no_difference(trained):
    saved = trained / "config.yaml"
    assert "dry_run: false" in saved.read_text()
    config = parse_config(Config, ["--config", str(saved), DRY])
    assert config.dry_run and differing_keys(config, saved) == {}


def test_durations():
    assert [duration(s) for s in (3.4, 89, 91, 5000, 7200)] == ["3 s", "89 s", "2 min", "83 min", "2.0 h"]
