from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline
from safetensors.torch import load_file

from latent_dmmd import FeatureNet, LatentDMMDPipeline, MeanEmbeddings
from latent_dmmd.pipeline import load_pipeline


@pytest.fixture
def pipe(tiny_vae):
    return tiny_pipeline(tiny_vae)


def run(pipe, **options):
    defaults = dict(batch_size=3, num_noise_levels=4, steps_per_level=2, output_type="pt")
    generator = torch.Generator().manual_seed(0)
    return pipe(**{**defaults, "generator": generator, **options}).images


@pytest.mark.parametrize("sampler", ["exact", "approximate", "hybrid"])
def test_round_trip_gives_identical_pictures(pipe, tmp_path, sampler):
    before = run(pipe, sampler=sampler)
    pipe.save_pretrained(tmp_path)
    again = LatentDMMDPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(before, run(again, sampler=sampler))
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.pt"))


def test_output_types(pipe):
    pt, array, pil = (run(pipe, output_type=kind) for kind in ("pt", "np", "pil"))
    assert pt.shape == (3, 3, 32, 32) and 0 <= pt.min() and pt.max() <= 1
    np.testing.assert_allclose(array, pt.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    np.testing.assert_allclose(np.asarray(pil[0]), 255 * array[0], atol=0.51)
    z = run(pipe, output_type="latent")
    assert torch.equal(pipe.decode(z, "pt"), pt)
    images = pipe(batch_size=2, num_noise_levels=2, steps_per_level=1, return_dict=False)
    assert isinstance(images, tuple) and len(images[0]) == 2


def test_seeds_chunks_and_independence(pipe):
    assert torch.equal(run(pipe), run(pipe))
    torch.testing.assert_close(run(pipe, chunk_size=2), run(pipe), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        run(pipe, sampler="exact", chunk_size=2), run(pipe, sampler="exact"), atol=1e-5, rtol=1e-4
    )
    several = run(pipe, generator=[torch.Generator().manual_seed(i) for i in (5, 6, 7)])
    alone = run(pipe, batch_size=1, generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(several[1:2], alone, atol=1e-5, rtol=1e-4)


def test_statistics_and_given_latents(pipe):
    z = torch.randn(2, *run(pipe, output_type="latent").shape[1:])
    same = run(pipe, batch_size=2, latents=z, step_size=1e-12, output_type="latent")
    torch.testing.assert_close(same, z)
    raw = z * torch.tensor([1.0, 2.0, 0.5, 1.5]).reshape(4, 1, 1) + torch.tensor([0.1, 0.2, 0.3, 0.4]).reshape(4, 1, 1)
    expected = (pipe.vae.decode(raw).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(pipe.decode(z, "pt"), expected.detach())


def test_encode_gives_standardised_particles(pipe):
    images_uint8 = torch.randint(0, 256, (5, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    z = pipe.encode(images_uint8, chunk_size=2)
    raw = pipe.vae.encode(images_uint8.float() / 127.5 - 1).latent_dist.mean
    mean, std = (torch.tensor(a).reshape(4, 1, 1) for a in ([0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 0.5, 1.5]))
    torch.testing.assert_close(z, (raw - mean) / std)
    assert pipe.resolution == 32


def test_load_pipeline(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipeline")
    assert torch.equal(run(load_pipeline(tmp_path / "pipeline")), run(pipe))
    with pytest.raises(ValueError, match="no pipeline"):
        load_pipeline(tmp_path)


def test_options_reach_the_flow(pipe):
    plain = run(pipe, sampler="exact", output_type="latent")
    for options in ({"self_term": "leave-one-out"}, {"self_term": "independent"}, {"noise_injection": 0.2}):
        z = run(pipe, sampler="exact", output_type="latent", **options)
        assert z.isfinite().all() and not torch.allclose(z, plain, atol=1e-3)
        assert torch.equal(z, run(pipe, sampler="exact", output_type="latent", **options))


def test_callback_sees_every_step_and_may_replace_particles(pipe):
    seen = []

    def record(pipeline, step, t, tensors):
        seen.append((step, round(t, 2), tensors["latents"].shape[0]))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 7 else {}

    z = run(pipe, callback_on_step_end=record, output_type="latent")
    assert seen == [(i, t, 3) for i, t in enumerate([1.0, 1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25])]
    assert not z.any()


def test_without_an_autoencoder_particles_are_pixels(tmp_path):
    torch.manual_seed(0)
    net = FeatureNet(16, 3, 5, patch_size=4, block_out_channels=(8,), attention_levels=(False,), layers_per_block=1)
    stored = MeanEmbeddings(2, 5)
    stored.levels.copy_(torch.tensor([0.5, 1.0]))
    stored.displacement.copy_(stored.levels)
    pipe = LatentDMMDPipeline(net, stored)
    pipe.set_progress_bar_config(disable=True)
    z = torch.rand(2, 3, 16, 16) * 2 - 1
    images = pipe(batch_size=2, num_noise_levels=2, steps_per_level=1, latents=z, output_type="pt").images
    torch.testing.assert_close(images, z / 2 + 0.5)  # a gradient scale of 0 does not move them
    pipe.save_pretrained(tmp_path)
    assert LatentDMMDPipeline.from_pretrained(tmp_path).vae is None


@pytest.mark.parametrize(
    "options, message",
    [
        ({"output_type": "jpeg"}, "output_type must be"),
        ({"batch_size": 0}, "batch_size"),
        ({"latents": torch.zeros(3, 4, 1, 1)}, "latents must have shape"),
        ({"num_noise_levels": 9}, "num_noise_levels"),
        ({"self_term": "twice"}, "self_term"),
        ({"noise_injection": -0.1}, "noise_injection"),
    ],
)
def test_refuses_what_cannot_be(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        run(pipe, **options)


def test_refuses_an_autoencoder_of_other_latents(pipe):
    net = FeatureNet(16, 3, 6, block_out_channels=(8,), attention_levels=(True,))
    with pytest.raises(ValueError, match="4 latent channels, the features take 3"):
        LatentDMMDPipeline(net, pipe.mean_embeddings, pipe.vae)


def test_load_pipeline_refuses_what_is_not_ours(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ValueError, match="holds a StableDiffusionPipeline"):
        load_pipeline(tmp_path)


ASSETS = Path(__file__).parents[1] / "latent_dmmd" / "assets"


@pytest.mark.parametrize("folder", sorted(ASSETS.glob("elpv-*")), ids=lambda path: path.name)
def test_bundled_pipelines_make_pictures(folder):
    pipe = load_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(2, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert images.shape == (2, 3, 256, 256) and 0.05 < images.std() < 0.5
    assert "cc-by-nc-sa-4.0" in (folder / "README.md").read_text()


def test_bundled_pipelines_are_small():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < 30e6


def test_pickled_weights_are_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    for path in tmp_path.rglob("*.safetensors"):
        torch.save(load_file(path), path.with_suffix(".bin"))
        path.unlink()
    with pytest.raises(OSError):
        load_pipeline(tmp_path)
