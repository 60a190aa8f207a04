from pathlib import Path

import pytest
import torch
from conftest import tiny_pipeline
from PIL import Image
from processes import ROOT, run

from latent_dmmd.apps.film import film, interpolation, save_film
from latent_dmmd.utils.images import save_animation, to_pixels, to_uint8

FILM, EDIT = ROOT / "scripts" / "film.py", ROOT / "scripts" / "edit.py"


@pytest.fixture
def pipe(tiny_vae):
    return tiny_pipeline(tiny_vae)


def seeded():
    return torch.Generator().manual_seed(0)


def random_images(count):
    return torch.randint(0, 256, (count, 3, 32, 32), generator=seeded()).to(torch.uint8)


def decoded(pipe, z):
    return to_uint8(pipe.decode(z, "pt") * 2 - 1)


def test_a_film_begins_with_noise_and_ends_with_the_images(pipe):
    frames = film(pipe, 2, 4, seeded())
    assert frames.shape == (5, 2, 3, 32, 32)
    assert torch.equal(frames[0], decoded(pipe, torch.randn(2, 4, 16, 16, generator=seeded())))
    last = pipe(2, num_inference_steps=4, generator=seeded(), output_type="latent").images
    assert torch.equal(frames[-1], decoded(pipe, last))


def test_interpolation_without_noise_is_between_latents(pipe):
    ends = random_images(2)
    frames = interpolation(pipe, ends, num_frames=3, strength=0)
    z = pipe.encode_pixels(to_pixels(ends))
    assert torch.equal(frames[1], decoded(pipe, z.mean(0, keepdim=True))[0])
    assert torch.equal(frames[[0, 2]], decoded(pipe, z))


def test_interpolation_shares_its_noise(pipe):
    ends = random_images(2)
    frames = interpolation(pipe, ends, 3, 0.5, 2, seeded())
    z = pipe.encode_pixels(to_pixels(ends))
    eps = torch.randn(1, 4, 16, 16, generator=seeded())
    noised = 0.5 * z[:1] + 0.5 * eps
    first = pipe.move(noised, 2, start=0.5)
    assert (frames[:1].float() - decoded(pipe, first).float()).abs().max() <= 1
    all_noise = interpolation(pipe, ends, 3, 1.0, 4, seeded())
    assert torch.equal(all_noise[0], all_noise[2])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"strength": 1.2}, "start must be in"),
        ({"num_frames": 1}, "2 frames"),
        ({"num_inference_steps": 0}, "at least 1"),
    ],
)
def test_refuses_what_cannot_be(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        interpolation(pipe, random_images(2), **options)


def test_an_animation_has_every_frame(tmp_path):
    save_animation(random_images(6).unflatten(0, (3, 2)), tmp_path / "film.webp")
    with Image.open(tmp_path / "film.webp") as file:
        assert file.n_frames == 3 and file.size == (64, 32)


def test_a_film_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    frames = random_images(6).unflatten(0, (3, 2))
    save_film(frames, tmp_path / "film", side=32)
    before = {path.name: path.read_bytes() for path in (tmp_path / "film").iterdir()}
    assert set(before) == {"strip.png", "film.webp"}

    def interrupted(image, file, *args, **options):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_film(255 - frames, tmp_path / "film", side=32)
    assert {path.name: path.read_bytes() for path in (tmp_path / "film").iterdir()} == before


def test_the_script_films_and_interpolates(pipe, tiny_images, tmp_path):
    pipe.save_pretrained(tmp_path / "pipeline")
    common = ("--pipeline", tmp_path / "pipeline", "--num_inference_steps", 2)
    result = run(FILM, *common, "--num_images", 2, "--output_dir", tmp_path / "flow")
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "flow" / "film.webp") as film, Image.open(tmp_path / "flow" / "strip.png") as strip:
        assert film.size == (64, 32) and strip.width == 3 * 128
    a, b = sorted(tiny_images.glob("*.png"))[:2]
    result = run(FILM, *common, "--from_image", a, "--to_image", b, "--num_frames", 4, "--output_dir", tmp_path / "way")
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "way" / "film.webp") as file:
        assert file.n_frames == 4
    result = run(FILM, *common, "--from_image", a, "--output_dir", tmp_path / "none")
    assert result.returncode == 2 and "give both" in result.stderr and not (tmp_path / "none").exists()


def test_the_edit_script_inpaints_and_enlarges(pipe, tiny_images, tmp_path):
    pipe.save_pretrained(tmp_path / "pipeline")
    Image.new("L", (32, 32), 255).save(tmp_path / "mask.png")
    common = (
        "--pipeline",
        tmp_path / "pipeline",
        "--image",
        next(tiny_images.glob("*.png")),
        "--num_inference_steps",
        2,
    )
    for kind, options in (
        ("inpainted", ("--mask_image", tmp_path / "mask.png")),
        ("enlarged", ("--num_variations", 2)),
    ):
        result = run(EDIT, *common, *options, "--output_dir", tmp_path / kind)
        assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "inpainted").glob("*.png"))) == 4
    assert len(list((tmp_path / "enlarged").glob("*.png"))) == 2
    result = run(EDIT, *common, "--scale", 5, "--output_dir", tmp_path / "none")
    assert result.returncode == 2 and "scale must" in result.stderr and not (tmp_path / "none").exists()
