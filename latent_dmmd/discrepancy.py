"""The maximum mean discrepancy and its witness.

For features x ~ P and y ~ Q and a kernel k (Gretton et al., 2012):

    MMD²(P, Q) = E k(x, x') + E k(y, y') − 2 E k(x, y)
    f(z) = E k(x, z) − E k(y, z)                            the witness, so that MMD² = E f(x) − E f(y)

With the linear kernel both are functions of the mean embeddings, Δ = E x − E y, and cost O(N):

    MMD² = ‖Δ‖²,     f(z) = ⟨z, Δ⟩
"""

from typing import Literal

import torch
from torch import Tensor

from latent_dmmd.kernels import Kernel, LinearKernel

Estimator = Literal["u", "v"]


def mmd2(x: Tensor, y: Tensor, kernel: Kernel | None = None, estimator: Estimator = "u") -> Tensor:
    """MMD²(P, Q) estimated from samples (Gretton et al., 2012, eqs. 3 and 5).

    The V-statistic averages over all pairs, is never negative and exceeds the U-statistic, which leaves out the pairs
    of a point with itself and is unbiased. With the linear kernel the cost is O(N + M), otherwise O((N + M)²).

    Args:
        x: Samples of P, with shape (N, F).
        y: Samples of Q, with shape (M, F).
        kernel: The base kernel; linear by default.
        estimator: "u" or "v".

    Returns:
        The estimate, with shape (), in float32 or better.

    Raises:
        ValueError: If the estimator is unknown, or "u" with fewer than two samples of either.
    """
    if estimator not in ("u", "v"):
        raise ValueError(f"estimator must be 'u' or 'v'; got {estimator!r}")
    if estimator == "u" and min(len(x), len(y)) < 2:
        raise ValueError(f"the U-statistic needs at least 2 samples of each; got {len(x)} and {len(y)}")
    kernel = kernel or LinearKernel()
    if isinstance(kernel, LinearKernel):
        return linear_mmd2(x, y, estimator)
    within_x, within_y = (mean_gram(kernel(a, a), estimator) for a in (x, y))
    return within_x + within_y - 2 * kernel(x, y).mean()


def mean_gram(gram: Tensor, estimator: Estimator) -> Tensor:
    """The mean of a Gram matrix (N, N), without its diagonal for the U-statistic."""
    if estimator == "v":
        return gram.mean()
    n = len(gram)
    return (gram.sum() - gram.diagonal().sum()) / (n * (n - 1))


def linear_mmd2(x: Tensor, y: Tensor, estimator: Estimator = "u") -> Tensor:
    """MMD² of the linear kernel from mean embeddings, in O(N).

    V = ‖x̄ − ȳ‖², and U = V − tr Σ̂_x / N − tr Σ̂_y / M with the unbiased covariances Σ̂. Leading dimensions are
    independent problems: (…, N, F) and (…, M, F) give (…).
    """
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(x.dtype, torch.float32)
        x, y = x.to(dtype), y.to(dtype)
        v = (x.mean(-2) - y.mean(-2)).square().sum(-1)
        if estimator == "v":
            return v
        return v - sum(a.var(-2).sum(-1) / a.shape[-2] for a in (x, y))


def witness(z: Tensor, x: Tensor, y: Tensor, kernel: Kernel | None = None) -> Tensor:
    """The witness f(z) = E k(x, z) − E k(y, z) (Gretton et al., 2012, sec. 2.3).

    Args:
        z: Where to evaluate, with shape (N, F).
        x: Samples of P, with shape (M, F).
        y: Samples of Q, with shape (M', F).
        kernel: The base kernel; linear by default.

    Returns:
        The values, with shape (N).
    """
    kernel = kernel or LinearKernel()
    if isinstance(kernel, LinearKernel):
        return linear_witness(z, x.mean(0) - y.mean(0))
    return kernel(z, x).mean(1) - kernel(z, y).mean(1)


def linear_witness(z: Tensor, delta: Tensor) -> Tensor:
    """f(z) = ⟨z, Δ⟩ from the difference of mean embeddings; (…, N, F) and (…, F) give (…, N)."""
    with torch.autocast(z.device.type, enabled=False):
        dtype = torch.promote_types(z.dtype, torch.float32)
        return (z.to(dtype) * delta.to(dtype).unsqueeze(-2)).sum(-1)
