import numpy as np
import pytest
import torch
from conftest import tiny_pipeline, tiny_velocity
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image

from latent_dmmd.editing import (
    LatentDMMDInpaintPipeline,
    LatentDMMDUpscalePipeline,
    SmallerImage,
    editor_of,
    resized,
)
from latent_dmmd.latent_pipeline import FlowOptions
from latent_dmmd.pipeline import LatentSchedulerPipeline


@pytest.fixture
def dmmd(tiny_vae):
    return tiny_pipeline(tiny_vae)


def flow_matching(tiny_vae, scheduler=None):
    torch.manual_seed(0)
    pipe = LatentSchedulerPipeline(tiny_velocity(16, 4), scheduler or FlowMatchEulerDiscreteScheduler(), tiny_vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=["dmmd", "flow matching"])
def pipe(request, tiny_vae):
    return tiny_pipeline(tiny_vae) if request.param == "dmmd" else flow_matching(tiny_vae)


def quiet(editor):
    editor.set_progress_bar_config(disable=True)
    return editor


@pytest.fixture
def image():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def mask():
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 5:20, 9:27] = 1
    return mask


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_known_pixels_stay_and_the_rest_is_made(pipe, image, mask):
    editor = quiet(editor_of(pipe, "inpaint"))
    first, second = (
        editor(image, mask, num_inference_steps=4, generator=seeded(s), output_type="pt").images for s in (0, 1)
    )
    torch.testing.assert_close(first * (1 - mask), image * (1 - mask), atol=1e-6, rtol=0)
    inside = mask.expand_as(image) > 0
    assert (first - second)[inside].abs().mean() > 1e-3
    again = editor(image, mask, num_inference_steps=4, generator=seeded(), output_type="pt").images
    assert torch.equal(first, again)


def test_what_is_under_the_mask_has_no_influence_at_full_strength(pipe, image, mask):
    editor = quiet(editor_of(pipe, "inpaint"))
    other = torch.where(mask > 0, 1 - image, image)

    def run(given, strength):
        how = dict(strength=strength, num_inference_steps=2, generator=seeded(), output_type="pt")
        return editor(given, mask, **how).images

    assert torch.equal(run(image, 1.0), run(other, 1.0))
    assert not torch.equal(run(image, 0.5), run(other, 0.5))


def test_an_empty_mask_gives_back_the_image(pipe, image, mask):
    editor = quiet(editor_of(pipe, "inpaint"))
    edited = editor(image, 0 * mask, num_inference_steps=2, generator=seeded(), output_type="pt").images
    torch.testing.assert_close(edited, image, atol=1e-6, rtol=0)


def test_enlarged_images_shrink_to_the_given_ones(pipe, image):
    small = resized(image * 2 - 1, 8) / 2 + 0.5
    editor = quiet(editor_of(pipe, "upscale"))
    editor.image_processor.postprocess = lambda pixels, output_type: pixels  # before it cuts off at 0 and 1
    pixels = editor(small.clamp(0, 1), num_inference_steps=4, generator=seeded()).images
    assert pixels.shape == image.shape
    error = resized(pixels, 8) / 2 + 0.5 - small.clamp(0, 1)
    assert error.square().mean() < 10 ** (-40 / 10)  # 40 dB, of noise


def test_back_projection_converges():
    small = torch.rand(1, 3, 8, 8, generator=seeded())
    errors = [(resized(SmallerImage(small, n)(torch.zeros(1, 3, 32, 32)), 8) - small).abs().max() for n in (1, 3, 6)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_what_agrees_already_is_left_to_the_flow(dmmd, image):
    """With a Π that changes nothing and no fresh noise, the edit is the plain flow."""
    editor = quiet(editor_of(dmmd, "inpaint"))
    edited = editor.edit(image * 2 - 1, lambda x, which: x, 1.0, 4, 0.0, seeded(), None)
    z = torch.randn(2, 4, 16, 16, generator=seeded())
    plain = dmmd(2, latents=z, num_inference_steps=4, output_type="latent").images
    torch.testing.assert_close(edited, dmmd.decode_to_pixels(plain), atol=1e-4, rtol=1e-4)


def test_a_perfect_field_ends_at_the_constrained_image(image, mask):
    """Particles that make for x_0 are brought to it, whatever noise is added on the way; here particles are pixels."""
    pixels = image * 2 - 1
    net = tiny_velocity(32, 3)
    net.forward = lambda x, t: (x - pixels) / t
    editor = quiet(editor_of(LatentSchedulerPipeline(net, FlowMatchEulerDiscreteScheduler()), "inpaint"))
    grey = torch.full_like(image, 0.5)
    edited = editor(grey, mask, num_inference_steps=5, generator=seeded(), output_type="pt").images
    torch.testing.assert_close(edited, torch.where(mask > 0, image, grey), atol=1e-5, rtol=0)


def test_variations_follow_each_other_and_lists_of_generators_are_independent(pipe, image, mask):
    editor = quiet(editor_of(pipe, "inpaint"))
    how = dict(num_inference_steps=2, output_type="pt")
    images = editor(image, mask, num_variations=2, generator=[seeded(s) for s in range(4)], **how).images
    assert len(images) == 4
    outside = 1 - mask
    torch.testing.assert_close(images * outside, image.repeat_interleave(2, 0) * outside, atol=1e-6, rtol=0)
    alone = editor(image[1:], mask, generator=[seeded(3)], **how).images
    torch.testing.assert_close(images[3:], alone, atol=1e-4, rtol=1e-4)


def test_pil_images_are_resized_and_saved_pipelines_edit(dmmd, tmp_path):
    dmmd.save_pretrained(tmp_path)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 40, 4), dtype=np.uint8), "RGBA")
    editor = quiet(LatentDMMDInpaintPipeline.from_pretrained(tmp_path))
    (edited,) = editor(photo, Image.new("1", (9, 9), 1), num_inference_steps=1, generator=seeded()).images
    assert edited.size == (32, 32) and edited.mode == "RGB"
    (edited,) = quiet(LatentDMMDUpscalePipeline.from_pretrained(tmp_path))(photo, num_inference_steps=1).images
    assert edited.size == (32, 32)


def test_a_callback_sees_every_step(pipe, image, mask):
    seen = []
    editor = quiet(editor_of(pipe, "inpaint"))

    def record(pipeline, step, t, tensors):
        seen.append((pipeline is editor, step, tensors["latents"].shape[0]))

    editor(image, mask, num_inference_steps=4, callback_on_step_end=record)
    assert seen == [(True, i, 2) for i in range(4)]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"strength": 0.0}, "start must be in"),
        ({"strength": 1.5}, "start must be in"),
        ({"eta": 1.1}, "eta must be in"),
        ({"num_variations": 0}, "num_variations"),
        ({"output_type": "latent"}, "output_type must be"),
        ({"image": torch.zeros(1, 3, 16, 16)}, "image must have 32 × 32"),
        ({"mask_image": torch.zeros(1, 1, 16, 16)}, "mask_image must have 32 × 32"),
        ({"mask_image": torch.zeros(3, 1, 32, 32)}, "as many masks"),
    ],
)
def test_refuses_what_cannot_be(pipe, image, mask, options, message):
    with pytest.raises(ValueError, match=message):
        quiet(editor_of(pipe, "inpaint"))(**{"image": image, "mask_image": mask, "num_inference_steps": 2, **options})


def test_refuses_other_scales_and_other_processes(dmmd, tiny_vae, image):
    with pytest.raises(ValueError, match="scale must be"):
        quiet(editor_of(dmmd, "upscale"))(image, scale=5)
    with pytest.raises(ValueError, match="linear forward process"):
        quiet(editor_of(flow_matching(tiny_vae, DDIMScheduler()), "upscale"))(image[..., :8, :8])
    dmmd.mean_embeddings.process = object()
    with pytest.raises(ValueError, match="linear forward process"):
        quiet(editor_of(dmmd, "upscale"))(image[..., :8, :8])


@pytest.mark.parametrize("task", ["inpaint", "upscale"])
def test_an_editor_has_all_of_a_pipeline(tiny_vae, task):
    pipe = tiny_pipeline(tiny_vae)
    pipe.flow_options = FlowOptions(chunk_size=3)
    editor = editor_of(pipe, task)
    assert editor.flow_options == pipe.flow_options
    for name in ("sampling", "class_names", "latents_mean", "latents_std"):
        assert editor.config[name] == pipe.config[name]
