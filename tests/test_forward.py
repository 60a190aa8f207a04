import pytest
import torch

from latent_dmmd.forward import FORWARD_PROCESSES, get_forward_process, noise_levels

NAMES = sorted(FORWARD_PROCESSES)


@pytest.mark.parametrize("name", NAMES)
def test_starts_at_data_and_ends_in_noise(name):
    torch.manual_seed(0)
    process, x_0, eps = get_forward_process(name), torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3)
    torch.testing.assert_close(process.sample(x_0, torch.zeros(4), eps), x_0)
    torch.testing.assert_close(process.sample(x_0, torch.ones(4), eps), eps, atol=0.02, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_displacement_is_that_of_draws(name):
    generator = torch.Generator().manual_seed(0)
    process, t = get_forward_process(name), torch.tensor([0.1, 0.5, 1.0])
    x_0, eps = (torch.randn(3, 200_000, generator=generator) for _ in range(2))
    measured = (process.sample(x_0, t, eps) - x_0).square().mean(1).sqrt()
    torch.testing.assert_close(process.displacement(t), measured, rtol=0.01, atol=0)
    assert (process.displacement(noise_levels(50)).diff() > 0).all()


@pytest.mark.parametrize("name", ["vp-cosine", "vp-linear"])
def test_variance_preserving(name):
    process, t = get_forward_process(name), torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(process.alpha(t).square() + process.sigma(t).square(), torch.ones_like(t))


def test_segments_of_the_linear_interpolant_are_its_own_draws():
    """(1 − u) x_0 + u x_t = x_{ut}: the witness of one level is trained on all levels below it."""
    torch.manual_seed(0)
    process, x_0, eps = get_forward_process("linear"), torch.randn(5, 4), torch.randn(5, 4)
    t, u = torch.rand(5), torch.rand(5)
    x_t = process.sample(x_0, t, eps)
    torch.testing.assert_close((1 - u)[:, None] * x_0 + u[:, None] * x_t, process.sample(x_0, u * t, eps))


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="linear, vp-cosine"):
        get_forward_process("cosine")
