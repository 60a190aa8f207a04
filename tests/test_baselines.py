import torch
from torch import nn

from latent_dmmd import FeatureNet
from latent_dmmd.baselines import FlowMatching, VelocityNet, euler
from latent_dmmd.forward import LinearInterpolant
from latent_dmmd.objective import Batch

SIZES = dict(
    sample_size=4,
    in_channels=2,
    patch_size=2,
    block_out_channels=(4, 8),
    layers_per_block=1,
    attention_levels=(False, True),
    num_groups=2,
)


class GaussianVelocity(nn.Module):
    """The exact velocity E[ε − x_0 | x_t] for x_0 ~ N(m, s² I)."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, x, t):
        t = t.reshape(-1, 1, 1, 1) if t.ndim else t
        variance = (1 - t) ** 2 * self.std**2 + t**2
        residual = (x - (1 - t) * self.mean) / variance
        return t * residual - (self.mean + (1 - t) * self.std**2 * residual)


def test_the_exact_velocity_minimises_the_loss():
    generator = torch.Generator().manual_seed(0)
    x_0 = 0.5 + 0.6 * torch.randn(4, 500, 2, 4, 4, generator=generator)
    eps, u = torch.randn(x_0.shape, generator=generator), torch.rand(4, 500, generator=generator)
    batch = Batch(x_0, torch.arange(4), eps, u)
    losses = []
    for mean, std in ((0.5, 0.6), (0.4, 0.6), (0.6, 0.6), (0.5, 0.5), (0.5, 0.7)):
        objective = FlowMatching(GaussianVelocity(mean, std), LinearInterpolant(), 4)
        losses.append(objective(batch).total.item())
    assert min(losses) == losses[0]


def test_euler_arrives_at_the_data():
    z = torch.randn(2000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    end = euler(GaussianVelocity(0.5, 0.6), z, 200)
    torch.testing.assert_close(end, 0.5 + 0.6 * z, atol=0.02, rtol=0)


def test_shape_round_trip_and_same_backbone(tmp_path):
    torch.manual_seed(0)
    net, x, t = VelocityNet(**SIZES), torch.randn(3, 2, 4, 4), torch.rand(3)
    v = net(x, t)
    assert v.shape == x.shape
    torch.testing.assert_close(net(x[1:2], t[1:2]), v[1:2])
    net.save_pretrained(tmp_path)
    assert torch.equal(VelocityNet.from_pretrained(tmp_path)(x, t), v)
    shapes = {name: p.shape for name, p in FeatureNet(num_features=8, **SIZES).named_parameters()}
    ours = {name: p.shape for name, p in net.named_parameters()}
    assert ours == {name: shape for name, shape in shapes.items() if name.split(".")[0] not in ("lift", "gate")}
