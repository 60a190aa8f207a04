"""Base kernels k(x, y) on features.

A noise-adaptive kernel is a base kernel on noise-conditional features, k_t(z, z') = k(φ(z, t), φ(z', t)). Every kernel
here maps features of shape (N, F) and (M, F) to the Gram matrix (N, M) in float32 or better, whatever the autocast
state, and has second derivatives everywhere: squared distances are written out, since `torch.cdist` has none. Leading
dimensions are independent problems: (…, N, F) and (…, M, F) give (…, N, M).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """‖x_i − y_j‖² for all pairs, clamped at 0.

    Args:
        x: Features, with shape (…, N, F).
        y: Features, with shape (…, M, F).

    Returns:
        The squared Euclidean distances, with shape (…, N, M).
    """
    distances = x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :] - 2 * x @ y.mT
    return distances.clamp(min=0)


class Kernel(nn.Module):
    """Base class: `forward` casts features to at least float32 outside autocast and calls `gram`."""

    def gram(self, x: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError

    def fitted(self, x: Tensor, y: Tensor) -> "Kernel":
        """This kernel with everything that depends on data settled on the pooled points, (…, N, F) and (…, M, F).

        A discrepancy has several Gram matrices; it asks for this first, so that all of them are of one kernel.
        """
        return self

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if x.ndim < 2 or y.ndim < 2 or x.shape[-1] != y.shape[-1]:
            raise ValueError(f"features must be (…, N, F) and (…, M, F); got {tuple(x.shape)} and {tuple(y.shape)}")
        # bf16 loses the difference of nearly equal means
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
            return self.gram(x.to(dtype), y.to(dtype))


class LinearKernel(Kernel):
    """k(x, y) = ⟨x, y⟩, the paper's choice: mean embeddings are vectors, and all sums cost O(N)."""

    def gram(self, x: Tensor, y: Tensor) -> Tensor:
        return x @ y.mT


class GaussianKernel(Kernel):
    """k(x, y) = Σ_b exp(−‖x − y‖² / (2 b²)), summed over the bandwidths b.

    Args:
        bandwidth: One bandwidth, several, or "median": the median distance of the pooled points, computed for
            each discrepancy and each problem of a batch, and treated as a constant (Gretton et al., 2012, sec. 8).

    Raises:
        ValueError: If a bandwidth is not positive.
    """

    def __init__(self, bandwidth: float | list[float] | tuple[float, ...] | str = 1.0) -> None:
        super().__init__()
        if isinstance(bandwidth, str):
            if bandwidth != "median":
                raise ValueError(f"bandwidth must be positive numbers or 'median'; got {bandwidth!r}")
            self.bandwidths = None
        else:
            self.bandwidths = tuple(bandwidth) if isinstance(bandwidth, (list, tuple)) else (bandwidth,)
            if not self.bandwidths or min(self.bandwidths) <= 0:
                raise ValueError(f"bandwidths must be positive; got {bandwidth}")

    def fitted(self, x: Tensor, y: Tensor) -> "GaussianKernel":
        if self.bandwidths is not None:
            return self
        kernel = GaussianKernel()
        kernel.bandwidths = (median_distance(x, y)[..., None, None],)
        return kernel

    def gram(self, x: Tensor, y: Tensor) -> Tensor:
        distances = squared_distances(x, y)
        return sum(torch.exp(-distances / (2 * b**2)) for b in self.fitted(x, y).bandwidths)


class RationalQuadraticKernel(Kernel):
    """k(x, y) = (1 + ‖x − y‖² / (2 α b²))^(−α), a scale mixture of Gaussian kernels.

    Args:
        alpha: The mixture parameter α; the kernel tends to the Gaussian one as α → ∞.
        bandwidth: The length scale b.

    Raises:
        ValueError: If alpha or bandwidth is not positive.
    """

    def __init__(self, alpha: float = 1.0, bandwidth: float = 1.0) -> None:
        super().__init__()
        if isinstance(bandwidth, (str, list, tuple)):
            raise ValueError(f"the rational-quadratic kernel needs one bandwidth, a number; got {bandwidth!r}")
        if alpha <= 0 or bandwidth <= 0:
            raise ValueError(f"alpha and bandwidth must be positive; got {alpha} and {bandwidth}")
        self.alpha, self.bandwidth = alpha, bandwidth

    def gram(self, x: Tensor, y: Tensor) -> Tensor:
        distances = squared_distances(x, y)
        return (1 + distances / (2 * self.alpha * self.bandwidth**2)) ** -self.alpha


@torch.no_grad()
def median_distance(x: Tensor, y: Tensor) -> Tensor:
    """The median Euclidean distance between distinct points of x and y pooled, with shape (…)."""
    with torch.autocast(x.device.type, enabled=False):
        points = torch.cat([x, y], dim=-2)
        points = points.to(torch.promote_types(points.dtype, torch.float32))
        points = points - points.mean(-2, keepdim=True)  # distances stay, and cancel less
        n = points.shape[-2]
        i, j = torch.triu_indices(n, n, offset=1, device=points.device)
        distances = squared_distances(points, points)[..., i, j]
    return distances.median(dim=-1).values.clamp(min=1e-12).sqrt()


KERNELS: dict[str, Callable[..., Kernel]] = {
    "linear": LinearKernel,
    "gaussian": GaussianKernel,
    "rational-quadratic": RationalQuadraticKernel,
}


def get_kernel(name: str, **options: float | list[float] | str) -> Kernel:
    """The kernel of that name, with the arguments of its class.

    Raises:
        ValueError: If there is no such kernel, or an argument is out of range.
    """
    if name not in KERNELS:
        raise ValueError(f"no kernel {name!r}; choose one of {', '.join(KERNELS)}")
    return KERNELS[name](**options)
