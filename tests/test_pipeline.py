import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_embeddings, tiny_features, tiny_pipeline
from safetensors.torch import load_file, save_file

from latent_dmmd import LatentDMMDInpaintPipeline, LatentDMMDPipeline, MeanEmbeddings
from latent_dmmd.flow import ApproximateFlow, ExactFlow, HybridFlow
from latent_dmmd.latent_pipeline import FlowOptions, bundled_pipelines
from latent_dmmd.pipeline import LatentSchedulerPipeline, load_pipeline
from latent_dmmd.schedule import flow_schedule


@pytest.fixture
def pipe(tiny_vae):
    return tiny_pipeline(tiny_vae)


def run(pipe, **options):
    defaults = dict(batch_size=3, num_noise_levels=4, steps_per_level=2, output_type="pt")
    generator = torch.Generator().manual_seed(0)
    return pipe(**{**defaults, "generator": generator, **options}).images


@pytest.mark.parametrize("sampler", ["exact", "approximate", "hybrid"])
def test_round_trip_gives_identical_images(pipe, tmp_path, sampler):
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
    whole = {sampler: run(pipe, sampler=sampler) for sampler in ("approximate", "exact")}
    for chunk_size in (2, None):
        pipe.flow_options = FlowOptions(chunk_size=chunk_size)
        for sampler, images in whole.items():
            torch.testing.assert_close(run(pipe, sampler=sampler), images, atol=1e-5, rtol=1e-4)
    several = run(pipe, generator=[torch.Generator().manual_seed(i) for i in (5, 6, 7)])
    alone = run(pipe, batch_size=1, generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(several[1:2], alone, atol=1e-5, rtol=1e-4)


def test_statistics_and_given_latents(pipe):
    z = torch.randn(2, *run(pipe, output_type="latent").shape[1:])
    pipe.flow_options = FlowOptions(step_size=1e-12)
    same = run(pipe, batch_size=2, latents=z, output_type="latent")
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


@pytest.mark.parametrize("step_size", [None, 0.02])
@pytest.mark.parametrize("sampler", ["exact", "approximate", "hybrid"])
def test_options_reach_the_flow(pipe, sampler, step_size):
    """With a constant step, exact witnesses have their own length."""
    net, stored, z = pipe.feature_net, pipe.mean_embeddings, torch.randn(3, 4, 16, 16)
    pipe.flow_options = FlowOptions(step_size=step_size, chunk_size=2)
    found = run(pipe, latents=z, sampler=sampler, output_type="latent")
    flow = {"exact": ExactFlow, "approximate": ApproximateFlow, "hybrid": HybridFlow}[sampler]
    expected = flow(net, stored, step_size=step_size).run(z, flow_schedule(stored, 4, 2))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    pipe.flow_options = FlowOptions(step_size=0.01)
    assert not torch.allclose(run(pipe, latents=z, sampler=sampler, output_type="latent"), found, atol=1e-4)


def test_options_are_of_one_pipeline(pipe, tiny_vae):
    pipe.flow_options = FlowOptions(chunk_size=2)
    assert tiny_pipeline(tiny_vae).flow_options == FlowOptions()


def test_what_a_call_does_not_say_is_the_pipelines_own(pipe, tmp_path):
    pipe.register_to_config(sampling=dict(sampler="exact", num_noise_levels=2, steps_per_level=3))
    pipe.save_pretrained(tmp_path)
    own = LatentDMMDPipeline.from_pretrained(tmp_path)
    own.set_progress_bar_config(disable=True)
    z, seen = torch.randn(3, 4, 16, 16), []
    how = dict(latents=z, output_type="latent")
    found = own(3, callback_on_step_end=lambda pipe, i, t, tensors: seen.append(t), **how).images
    assert seen == [1.0] * 3 + [0.5] * 3
    explicit = dict(sampler="exact", num_noise_levels=2, steps_per_level=3)
    assert torch.equal(found, own(3, **explicit, **how).images)
    for other in ({"sampler": "approximate"}, {"num_noise_levels": 4}, {"steps_per_level": 1}):
        expected = own(3, **{**explicit, **other}, **how).images
        assert torch.equal(own(3, **other, **how).images, expected)
        assert not torch.allclose(expected, found, atol=1e-4)
    # an NFE has precedence over levels and steps
    assert torch.equal(own(3, num_inference_steps=8, **how).images, run(own, sampler="exact", **how))


def test_a_pipeline_without_sampling_has_the_defaults():
    torch.manual_seed(0)
    pipe = LatentDMMDPipeline(tiny_features(), random_embeddings(30))
    pipe.set_progress_bar_config(disable=True)
    z = torch.randn(2, 2, 4, 4)
    how = dict(latents=z, output_type="latent")
    expected = pipe(2, num_noise_levels=25, steps_per_level=2, sampler="approximate", **how).images
    assert torch.equal(pipe(2, **how).images, expected)
    pipe = LatentDMMDPipeline(pipe.feature_net, pipe.mean_embeddings, sampling={"steps_per_level": 1})
    expected = dict(sampler="approximate", num_noise_levels=25, steps_per_level=1, solver_order=1)
    assert vars(pipe.sampling_defaults) == expected


def test_move_begins_at_the_highest_stored_level_up_to_start(pipe):
    z, seen = torch.randn(3, 4, 16, 16), []
    assert torch.equal(pipe.move(z, 8), run(pipe, latents=z, num_inference_steps=8, output_type="latent"))
    moved = pipe.move(z, 6, 0.8, lambda pipe, i, t, tensors: seen.append((i, round(t, 2), len(tensors["latents"]))))
    assert seen == [(i, t, 3) for i, t in enumerate([0.75, 0.75, 0.5, 0.5, 0.25, 0.25])]
    steps = flow_schedule(pipe.mean_embeddings, 3, 2, 0.8)
    expected = ApproximateFlow(pipe.feature_net, pipe.mean_embeddings).run(z, steps)
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=1e-4)
    assert pipe.trajectory(6, 0.8) == [0.75, *(step.end for step in steps)]
    zeros = pipe.move(z, 6, 0.8, lambda pipe, i, t, tensors: {"latents": torch.zeros_like(z)} if i == 5 else None)
    assert not zeros.any()
    with pytest.raises(ValueError, match="start must be in"):
        pipe.move(z, 6, 0.2)


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
    net, stored = tiny_features(16, 3, 5, patch_size=4, attention_levels=(False,)), random_embeddings(2, 5)
    stored.gradient_scale.zero_()
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
        ({"steps_per_level": 0}, "steps_per_level"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"sampler": "euler"}, "sampler must be"),
    ],
)
def test_refuses_what_cannot_be(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        run(pipe, **options)


def test_refuses_an_autoencoder_of_other_latents(pipe):
    with pytest.raises(ValueError, match="4 latent channels, the features take 3"):
        LatentDMMDPipeline(tiny_features(16, 3), pipe.mean_embeddings, pipe.vae)


def test_load_pipeline_refuses_what_is_not_ours(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ValueError, match="holds a StableDiffusionPipeline"):
        load_pipeline(tmp_path)


ASSETS = Path(__file__).parents[1] / "latent_dmmd" / "assets"
PIPELINES = sorted(path.parent for path in ASSETS.glob("*/model_index.json"))


@pytest.mark.parametrize("folder", PIPELINES, ids=lambda path: path.name)
def test_bundled_pipelines_make_images(folder):
    pipe = load_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    how = dict(generator=torch.Generator().manual_seed(0), output_type="pt")
    images = pipe(2, num_inference_steps=1 if "one-step" in folder.name else 2, **how).images
    assert images.shape == (2, 3, 256, 256) and 0.05 < images.std() < 0.5
    licence = {"elpv": "cc-by-nc-sa-4.0", "openmoji": "cc-by-sa-4.0"}[folder.name.partition("-")[0]]
    assert f"license: {licence}\n" in (folder / "README.md").read_text()


def test_bundled_pipelines_load_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bundled_pipelines() == [folder.name for folder in PIPELINES] != []
    classes = {"dmmd": LatentDMMDPipeline} | dict.fromkeys(("flow-matching", "one-step"), LatentSchedulerPipeline)
    for name in bundled_pipelines():
        data, _, method = name.partition("-")
        cls, channels = classes[method], {"elpv": 16, "openmoji": 8}[data]
        steps = 1 if method == "one-step" else 2
        how = dict(latents=torch.randn(1, channels, 16, 16), num_inference_steps=steps, output_type="latent")
        found = []
        for pipe in (cls.from_pretrained(name), load_pipeline(name), load_pipeline(ASSETS / name)):
            assert type(pipe) is cls
            pipe.set_progress_bar_config(disable=True)
            found.append(pipe(1, **how).images)
        for other in found[1:]:  # to rounding: kernels depend on where tensors lie in memory
            torch.testing.assert_close(other, found[0], atol=1e-4, rtol=1e-4)


def test_a_folder_wins_over_the_bundled_pipeline_of_its_name(pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe.save_pretrained("elpv-dmmd")
    for loaded in (LatentDMMDPipeline.from_pretrained("elpv-dmmd"), load_pipeline("elpv-dmmd")):
        assert loaded.net.config.num_features == 6 and loaded.config.latents_mean == [0.1, 0.2, 0.3, 0.4]


def test_unknown_names_are_told_the_bundled_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no pipeline in elpv-dmd.*elpv-dmmd, elpv-flow-matching"):
        load_pipeline("elpv-dmd")


def rewrite_as_0_1(folder):
    """Make a saved pipeline one of version 0.1: no class dimension without classes, and the displacement of levels."""
    path, index = folder / "mean_embeddings" / "diffusion_pytorch_model.safetensors", folder / "model_index.json"
    tensors = load_file(path)
    del tensors["lengthening"]
    if len(tensors["clean"]) == 1:
        tensors |= {name: tensors[name][0].contiguous() for name in ("clean", "noisy", "gradient_scale")}
    save_file(tensors | {"displacement": tensors["levels"].clone()}, path, metadata={"format": "pt"})
    parts = json.loads(index.read_text())
    assert parts["mean_embeddings"] == ["latent_dmmd.embeddings", "MeanEmbeddings"]
    parts["mean_embeddings"] = ["latent_dmmd.features", "MeanEmbeddings"]
    del parts["sampling"]
    index.write_text(json.dumps(parts))
    return tensors


@pytest.mark.parametrize(
    "options, shape",
    [
        ({}, (4, 6)),
        ({"num_points": 5, "discrepancy": {"name": "kale", "kernel": "linear"}}, (4, 5, 6)),
        ({"num_classes": 2}, (3, 4, 6)),
    ],
    ids=["means", "features", "classes"],
)
def test_pipelines_saved_by_0_1_load(tmp_path, options, shape):
    torch.manual_seed(0)
    stored = random_embeddings(**options)
    pipe = LatentDMMDPipeline(tiny_features(num_classes=options.get("num_classes", 0)), stored)
    pipe.set_progress_bar_config(disable=True)
    how = dict(latents=torch.randn(3, 2, 4, 4), num_inference_steps=8, output_type="latent")
    before = pipe(3, **how).images
    pipe.save_pretrained(tmp_path)
    assert rewrite_as_0_1(tmp_path)["clean"].shape == shape
    for loaded in (LatentDMMDPipeline.from_pretrained(tmp_path), load_pipeline(tmp_path)):
        loaded.set_progress_bar_config(disable=True)
        buffers = dict(loaded.mean_embeddings.named_buffers())
        assert buffers.keys() == {"levels", "gradient_scale", "lengthening", "clean", "noisy"}
        assert all(torch.equal(a, buffers[name]) for name, a in stored.named_buffers())
        # not bit for bit: kernels depend on where tensors lie in memory
        torch.testing.assert_close(loaded(3, **how).images, before, atol=1e-5, rtol=1e-5)
    folder = tmp_path / "mean_embeddings"
    _, found = MeanEmbeddings.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    # what is saved then has the new shapes
    loaded.save_pretrained(tmp_path / "again")
    saved = load_file(tmp_path / "again" / "mean_embeddings" / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == buffers.keys() and saved["clean"].shape == stored.clean.shape


def test_bundled_weights_are_small():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < 60e6


def test_pickled_weights_are_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    for path in tmp_path.rglob("*.safetensors"):
        torch.save(load_file(path), path.with_suffix(".bin"))
        path.unlink()
    with pytest.raises(OSError):
        load_pipeline(tmp_path)


def test_a_device_map_loads_what_0_1_saved(tmp_path):
    LatentDMMDPipeline(tiny_features(), random_embeddings()).save_pretrained(tmp_path)
    rewrite_as_0_1(tmp_path)
    pipe = LatentDMMDPipeline.from_pretrained(tmp_path, device_map="cpu")
    assert pipe.mean_embeddings.clean.shape[0] == 1
    assert torch.equal(pipe.mean_embeddings.clean, load_pipeline(tmp_path).mean_embeddings.clean)


def test_another_pipeline_of_the_same_parts_keeps_the_options_of_its_flow(pipe):
    pipe.flow_options = FlowOptions(chunk_size=3, step_size=0.1)
    assert LatentDMMDInpaintPipeline.from_pipe(pipe).flow_options == pipe.flow_options
