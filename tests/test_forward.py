import math

import pytest
import torch

from latent_dmmd.forward import FORWARD_PROCESSES, Blur, cosine_basis, get_forward_process, noise_levels

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
    x_0, eps = (torch.randn(3, 50, 64, 64, generator=generator) for _ in range(2))
    measured = (process.sample(x_0, t, eps) - x_0).square().mean((1, 2, 3)).sqrt()
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


@pytest.mark.parametrize("name", ["linear", "vp-cosine", "vp-linear"])
def test_steps_carry_the_process_to_itself(name):
    """z = α_s x_0 + σ_s ε and the true x_t − x_0 give α_e x_0 + σ_e ε, to rounding."""
    process, t, s, e = get_forward_process(name), 0.8, 0.7, 0.45
    x_0, eps = torch.randn(2, 1, 5, dtype=torch.float64)
    x_t, x_s, x_e = (process.sample(x_0, torch.tensor([v], dtype=torch.float64), eps) for v in (t, s, e))
    a, b = process.step_coefficients(t, s, e)
    torch.testing.assert_close(a * x_s - b * (x_t - x_0), x_e)
    a, b = process.step_coefficients(t, s, 0.0)
    torch.testing.assert_close(a * x_s - b * (x_t - x_0), x_0)


def test_steps_of_the_linear_interpolant_are_plain_gradient_steps():
    assert get_forward_process("linear").step_coefficients(0.8, 0.6, 0.5) == pytest.approx((1.0, 0.125))


def test_steps_of_any_process_go_straight_and_arrive():
    process, levels = Blur(), [1.0, 0.7, 0.2, 0.0]
    position = 1.0  # share of the way from the data to where the particle began
    for t, end in zip(levels, levels[1:]):
        a, b = process.step_coefficients(t, t, end)
        assert a == 1.0 and 0 < b <= 1
        position *= 1 - b
    assert position == pytest.approx(0)
    halves = [process.step_coefficients(0.7, *ends)[1] for ends in ((0.7, 0.5), (0.5, 0.2))]
    assert sum(halves) == pytest.approx(process.step_coefficients(0.7, 0.7, 0.2)[1])


def test_blur_is_the_heat_equation():
    basis = cosine_basis(16)
    torch.testing.assert_close(basis @ basis.T, torch.eye(16, dtype=torch.float64))
    zero, t = torch.zeros(1, 1, 16, 16, dtype=torch.float64), torch.tensor([0.8], dtype=torch.float64)
    flat = torch.full_like(zero, 3.0)
    torch.testing.assert_close(Blur().sample(flat, t, zero), 0.2 * flat)
    wave = (basis[5][:, None] * basis[2][None, :])[None, None]
    kept = 0.2 * math.exp(-0.5 * 0.8**2 * math.pi**2 * (25 + 4) / 16**2)
    torch.testing.assert_close(Blur().sample(wave, t, zero), kept * wave)
    torch.testing.assert_close(Blur().sample(zero, t, wave), 0.8 * wave)


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="linear, vp-cosine"):
        get_forward_process("cosine")
