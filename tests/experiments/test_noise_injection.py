import pytest
import torch
from conftest import random_embeddings, tiny_features

from latent_dmmd.experiments.noise_injection import InjectedApproximateFlow, InjectedExactFlow
from latent_dmmd.flow import ApproximateFlow, ExactFlow
from latent_dmmd.schedule import flow_schedule


def seeded():
    return torch.Generator().manual_seed(4)


@pytest.fixture
def setting():
    return tiny_features().double(), random_embeddings().double(), torch.randn(5, 2, 4, 4, dtype=torch.float64)


def test_the_stored_witness_is_taken_elsewhere(setting):
    net, stored, z = setting
    flow = InjectedApproximateFlow(net, stored, noise_injection=0.3, generator=seeded())
    noise = torch.randn(z.shape, generator=seeded(), dtype=z.dtype)
    torch.testing.assert_close(flow.gradient(z, 1), ApproximateFlow(net, stored).gradient(z + 0.3 * noise, 1))


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_the_exact_witness_is_of_the_particles_and_taken_elsewhere(setting, chunk_size):
    net, stored, z = setting
    options = dict(noise_injection=0.3, generator=seeded(), rescale=False, chunk_size=chunk_size)
    found = InjectedExactFlow(net, stored, **options).gradient(z, 1)
    noise, t = torch.randn(z.shape, generator=seeded(), dtype=z.dtype), stored.levels[1]
    difference = net(z, t).mean(0).detach() - stored.clean[0, 1]
    x = (z + 0.3 * noise).requires_grad_()
    (expected,) = torch.autograd.grad((net(x, t) @ difference).sum(), x)
    torch.testing.assert_close(found, expected)


def test_without_noise_it_is_the_flow(setting):
    net, stored, z = setting
    steps = flow_schedule(stored, 4, 2)
    injected = InjectedExactFlow(net, stored, noise_injection=0.0).run(z, steps)
    torch.testing.assert_close(injected, ExactFlow(net, stored).run(z, steps))


def test_refuses_negative_noise(setting):
    with pytest.raises(ValueError, match="noise_injection must not be negative"):
        InjectedExactFlow(*setting[:2], noise_injection=-0.1)
