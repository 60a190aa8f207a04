import pytest
import torch
from conftest import tiny_features
from torch.autograd import gradcheck, gradgradcheck

from latent_dmmd.features import FEATURE_NETS

each_architecture = pytest.mark.parametrize("architecture", FEATURE_NETS.values(), ids=FEATURE_NETS)


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


@each_architecture
def test_second_derivatives_of_the_penalty(architecture):
    """Fact 10, for the input and for a parameter of every kind of layer."""
    net = small(architecture=architecture).double()
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


@each_architecture
def test_every_parameter_reaches_the_penalty(architecture):
    net = small(architecture=architecture, squared_norm=True, num_classes=2)
    x = torch.randn(3, 2, 4, 4, requires_grad=True)
    (g,) = torch.autograd.grad((net(x, torch.rand(3)) * torch.randn(5)).sum(), x, create_graph=True)
    g.square().sum().backward()
    missing = [name for name, p in net.named_parameters() if p.grad is None]
    assert missing == []


@each_architecture
@pytest.mark.parametrize("options", [{}, {"patch_size": 2}, {"block_out_channels": (8,), "attention_levels": (True,)}])
def test_shape_batch_independence_and_level(options, architecture):
    net = small(architecture=architecture, **options)
    x, t = torch.randn(3, 2, 4, 4), torch.tensor([0.1, 0.5, 1.0])
    phi = net(x, t)
    assert phi.shape == (3, 5) and phi.dtype == torch.float32
    torch.testing.assert_close(phi[1:2], net(x[1:2], t[1:2]))
    assert not torch.allclose(phi, net(x, t.flip(0)))
    torch.testing.assert_close(net(x, torch.tensor(0.5))[1], phi[1])


@each_architecture
def test_round_trip(tmp_path, architecture):
    net = small(architecture=architecture)
    net.save_pretrained(tmp_path)
    again = architecture.from_pretrained(tmp_path)
    x, t = torch.randn(2, 2, 4, 4), torch.rand(2)
    assert torch.equal(net(x, t), again(x, t))


@each_architecture
def test_classes_are_told_apart(architecture):
    net, x = small(architecture=architecture, num_classes=2), torch.randn(3, 2, 4, 4)
    one, other, anything = (net(x, torch.tensor(0.5), label) for label in (0, 1, None))
    assert not torch.allclose(one, other) and not torch.allclose(one, anything)
    each = net(x, torch.tensor(0.5), torch.tensor([0, 1, 2]))
    torch.testing.assert_close(each, torch.stack([one[0], other[1], anything[2]]))


@each_architecture
def test_refuses_what_does_not_fit(architecture):
    with pytest.raises(ValueError, match="multiple of"):
        small(size=6, architecture=architecture, block_out_channels=(8, 8, 8), attention_levels=(False,) * 3)
    with pytest.raises(ValueError, match="multiples of 2, or less; got 9"):
        small(architecture=architecture, block_out_channels=(8, 9), attention_levels=(False, True))
    with pytest.raises(ValueError, match="2 entries"):
        small(architecture=architecture, block_out_channels=(8, 8), attention_levels=(True,))
    with pytest.raises(ValueError, match=r"must have shape \(B, 2, 4, 4\)"):
        small(architecture=architecture)(torch.zeros(1, 2, 8, 8), torch.zeros(1))


@each_architecture
@pytest.mark.parametrize("width", [8, 70, 104])
def test_attention_of_any_width_that_is_allowed(architecture, width):
    net = small(architecture=architecture, block_out_channels=(8, width), attention_levels=(False, True))
    assert net(torch.randn(2, 2, 4, 4), torch.tensor(0.5)).isfinite().all()


@each_architecture
def test_the_squared_norm_lets_the_gradient_be_the_input(architecture):
    """Where no map reads x, only the gated norm does: its gradient is γ x / √D."""
    torch.manual_seed(0)
    sizes = dict(patch_size=2, block_out_channels=(4,), attention_levels=(False,), conv_in_kernel=1)
    net = tiny_features(4, 3, 1, architecture, squared_norm=True, **sizes)
    for module in (net.conv_in, *getattr(net, "lifts", [getattr(net, "lift", None)])):
        torch.nn.init.zeros_(module.weight)
    torch.nn.init.constant_(net.norm_gate.bias, 0.7)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(net(x, torch.tensor(0.5)).sum(), x)
    torch.testing.assert_close(gradient, 0.7 * x / 48**0.5)


def test_the_encoder_pairs_the_maps_of_every_scale_with_the_pooled_input():
    """Against loops over scales and positions, from the blocks' outputs alone."""
    net = small(architecture=FEATURE_NETS["encoder"], patch_size=2, size=8, num_groups=1).double()
    x, t = torch.randn(2, 2, 8, 8, dtype=torch.float64), torch.tensor([0.3, 0.8], dtype=torch.float64)
    patches, scales, embedding = net.encode(x, t)
    assert patches.shape == (2, 8, 4, 4) and [h.shape[1:] for h in scales] == [(4, 4, 4), (8, 2, 2)]
    expected = 0.0
    for i, (h, norm, head, lift) in enumerate(zip(scales, net.norms, net.heads, net.lifts)):
        side, window = h.shape[-1], 4 // h.shape[-1]
        maps = head(torch.nn.functional.silu(norm(h)))
        gate = net.gate(torch.cat([scales[-1].mean((2, 3)), embedding], 1)) * (i == 0)
        for row in range(side):
            for column in range(side):
                ys, xs = (slice(at * window, (at + 1) * window) for at in (row, column))
                ell = patches[:, :, ys, xs].mean((2, 3)) @ lift.weight[:, :, 0, 0].T + lift.bias
                expected = expected + ell * (maps[:, :, row, column] + gate * ell) / side
    torch.testing.assert_close(net(x, t), expected)


def test_the_encoder_is_the_way_down_of_the_u_net():
    """Same blocks under the same names, which one-step generators start from, and no others of the U-Net's."""
    whole, half = small(), small(architecture=FEATURE_NETS["encoder"])
    ways = ("up.", "upsample.", "norm_out.", "conv_out.", "lift.")
    shared = {name for name in whole.state_dict() if not name.startswith(ways)}
    own = ("norms.", "heads.", "lifts.")
    assert {name for name in half.state_dict() if not name.startswith(own)} == shared
    half.load_state_dict({name: whole.state_dict()[name] for name in shared}, strict=False)
    x, t = torch.randn(2, 2, 4, 4), torch.rand(2)
    for a, b in zip(whole.encode(x, t)[1], half.encode(x, t)[1]):
        assert torch.equal(a, b)


def test_parameters_keep_their_order():
    """Optimiser states of checkpoints count parameters: the layers come in the order of 0.1."""
    groups = list(dict.fromkeys(name.split(".")[0] for name, _ in small(squared_norm=True).named_parameters()))
    ways = ["time_embedding", "conv_in", "down", "up", "downsample", "upsample", "norm_out", "conv_out"]
    assert groups == [*ways, "lift", "gate", "norm_gate"]
