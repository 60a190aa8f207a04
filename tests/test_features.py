import pytest
import torch
from conftest import tiny_features
from torch.autograd import gradcheck, gradgradcheck

from latent_dmmd import FeatureNet


def trained_like(net):
    """Give layers that start at zero some weight, as training would."""
    torch.manual_seed(1)
    for parameter in net.parameters():
        if parameter.ndim > 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return net


def small(**options):
    torch.manual_seed(0)
    defaults = dict(num_features=5, block_out_channels=(4, 8), attention_levels=(False, True))
    return trained_like(tiny_features(**{**defaults, **options}))


def test_second_derivatives_of_the_penalty():
    """Fact 10, for the input and for a parameter of every kind of layer."""
    net = small().double()
    x, t = torch.randn(2, 2, 4, 4, dtype=torch.float64), torch.tensor([0.3, 0.9], dtype=torch.float64)
    assert gradcheck(lambda z: net(z, t), x.requires_grad_())
    assert gradgradcheck(lambda z: net(z, t), x)

    def penalty():
        z = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(net(z, t).sum(), z, create_graph=True)
        return g.square().sum()

    penalty().backward()
    for name, parameter in net.named_parameters():
        if not name.endswith("weight"):
            continue
        direction = torch.randn_like(parameter)
        slope = (parameter.grad * direction).sum()
        values = []
        for sign in (1, -1):
            parameter.data += sign * 1e-5 * direction
            values.append(penalty().detach())
            parameter.data -= sign * 1e-5 * direction
        torch.testing.assert_close(slope, (values[0] - values[1]) / 2e-5, rtol=1e-4, atol=1e-5, msg=name)


def test_every_parameter_reaches_the_penalty():
    net = small()
    x = torch.randn(3, 2, 4, 4, requires_grad=True)
    (g,) = torch.autograd.grad((net(x, torch.rand(3)) * torch.randn(5)).sum(), x, create_graph=True)
    g.square().sum().backward()
    missing = [name for name, p in net.named_parameters() if p.grad is None]
    assert missing == []


@pytest.mark.parametrize("options", [{}, {"patch_size": 2}, {"block_out_channels": (8,), "attention_levels": (True,)}])
def test_shape_batch_independence_and_level(options):
    net = small(**options)
    x, t = torch.randn(3, 2, 4, 4), torch.tensor([0.1, 0.5, 1.0])
    phi = net(x, t)
    assert phi.shape == (3, 5) and phi.dtype == torch.float32
    torch.testing.assert_close(phi[1:2], net(x[1:2], t[1:2]))
    assert not torch.allclose(phi, net(x, t.flip(0)))
    torch.testing.assert_close(net(x, torch.tensor(0.5))[1], phi[1])


def test_round_trip(tmp_path):
    net = small()
    net.save_pretrained(tmp_path)
    again = FeatureNet.from_pretrained(tmp_path)
    x, t = torch.randn(2, 2, 4, 4), torch.rand(2)
    assert torch.equal(net(x, t), again(x, t))


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="multiple of"):
        tiny_features(6, block_out_channels=(8, 8, 8), attention_levels=(False,) * 3)
    with pytest.raises(ValueError, match="2 entries"):
        tiny_features(block_out_channels=(8, 8), attention_levels=(True,))
    with pytest.raises(ValueError, match=r"must have shape \(B, 2, 4, 4\)"):
        small()(torch.zeros(1, 2, 8, 8), torch.zeros(1))


def test_the_squared_norm_lets_the_gradient_be_the_input():
    """Where no map reads x, only the gated norm does: its gradient is γ x / √D."""
    torch.manual_seed(0)
    sizes = dict(patch_size=2, block_out_channels=(4,), attention_levels=(False,), conv_in_kernel=1)
    net = tiny_features(4, 3, 1, squared_norm=True, **sizes)
    for module in (net.conv_in, net.lift):
        torch.nn.init.zeros_(module.weight)
    torch.nn.init.constant_(net.norm_gate.bias, 0.7)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(net(x, torch.tensor(0.5)).sum(), x)
    torch.testing.assert_close(gradient, 0.7 * x / 48**0.5)
