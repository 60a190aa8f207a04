"""Discrepancies between two samples and their witnesses: the maximum mean discrepancy, and KALE.

For features x ~ P and y ~ Q and a kernel k with feature space H (Gretton et al., 2012):

    MMD²(P, Q) = E k(x, x') + E k(y, y') − 2 E k(x, y)
    f(z) = E k(x, z) − E k(y, z)                            the witness, so that MMD² = E f(x) − E f(y) = ‖f‖²_H

With the linear kernel both are functions of the mean embeddings, Δ = E x − E y, and cost O(N):

    MMD² = ‖Δ‖²,     f(z) = ⟨z, Δ⟩

The KL approximate lower bound estimator (Arbel et al., 2021; Glaser et al., 2021) has another witness in H:

    KALE(P ‖ Q) = (1 + λ) max_h { 1 + E h(x) − E exp h(y) − ½ λ ‖h‖²_H },     λ → ∞: ½ MMD²,   λ → 0: KL

Either way a witness is a weighted sum of kernel functions at points, f = Σ_i w_i k(p_i, ·): `Witness`. The gradient
flow needs nothing else of a discrepancy, and every function here takes leading dimensions as independent problems.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import ClassVar, Literal

import torch
from torch import Tensor

from latent_dmmd.kernels import Kernel, LinearKernel, get_kernel

Estimator = Literal["u", "v"]


def in_float32(function: Callable) -> Callable:
    """Run outside autocast, with tensors in float32 or better: bf16 loses the difference of nearly equal means."""

    @wraps(function)
    def wrapped(x: Tensor, y: Tensor, *args, **kwargs):
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
            return function(x.to(dtype), y.to(dtype), *args, **kwargs)

    return wrapped


@dataclass(frozen=True)
class Witness:
    """f(z) = Σ_i w_i k(p_i, z), an element of the feature space H of the kernel.

    Attributes:
        kernel: k.
        points: p, with shape (…, M, F).
        weights: w, with shape (…, M).
    """

    kernel: Kernel
    points: Tensor
    weights: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        """The values at features z (…, N, F), with shape (…, N)."""
        if isinstance(self.kernel, LinearKernel) and self.points.shape[-2] == 1:
            return linear_witness(z, self.points[..., 0, :] * self.weights)
        return (self.kernel(z, self.points) * self.weights[..., None, :]).sum(-1)

    def norm(self) -> Tensor:
        """‖f‖_H = (Σ_ij w_i w_j k(p_i, p_j))^½, with shape (…); for the witness of MMD it is the MMD (V-statistic)."""
        if isinstance(self.kernel, LinearKernel):
            square = (self.weights[..., None] * self.points).sum(-2).square().sum(-1)
        else:
            weights = self.weights[..., :, None] * self.weights[..., None, :]
            square = (weights * self.kernel(self.points, self.points)).sum((-2, -1))
        return square.clamp(min=1e-24).sqrt()  # the plain root has no derivative at 0

    def scaled(self, factor: Tensor | float) -> "Witness":
        """factor · f, with a factor of shape (…) or a number."""
        factor = factor[..., None] if isinstance(factor, Tensor) else factor
        return Witness(self.kernel, self.points, self.weights * factor)


def mmd2(x: Tensor, y: Tensor, kernel: Kernel | None = None, estimator: Estimator = "u") -> Tensor:
    """MMD²(P, Q) estimated from samples (Gretton et al., 2012, eqs. 3 and 5).

    The V-statistic averages over all pairs, is never negative and exceeds the U-statistic, which leaves out the pairs
    of a point with itself and is unbiased. With the linear kernel the cost is O(N + M), otherwise O((N + M)²).

    Args:
        x: Samples of P, with shape (…, N, F).
        y: Samples of Q, with shape (…, M, F).
        kernel: The base kernel; linear by default.
        estimator: "u" or "v".

    Returns:
        The estimate, with shape (…), in float32 or better.

    Raises:
        ValueError: If the estimator is unknown, or "u" with fewer than two samples of either.
    """
    if estimator not in ("u", "v"):
        raise ValueError(f"estimator must be 'u' or 'v'; got {estimator!r}")
    n, m = x.shape[-2], y.shape[-2]
    if estimator == "u" and min(n, m) < 2:
        raise ValueError(f"the U-statistic needs at least 2 samples of each; got {n} and {m}")
    kernel = (kernel or LinearKernel()).fitted(x, y)
    if isinstance(kernel, LinearKernel):
        return linear_mmd2(x, y, estimator)
    within_x, within_y = (mean_gram(kernel(a, a), estimator) for a in (x, y))
    return within_x + within_y - 2 * kernel(x, y).mean((-2, -1))


def mean_gram(gram: Tensor, estimator: Estimator) -> Tensor:
    """The mean of a Gram matrix (…, N, N), without its diagonal for the U-statistic."""
    if estimator == "v":
        return gram.mean((-2, -1))
    n = gram.shape[-1]
    return (gram.sum((-2, -1)) - gram.diagonal(dim1=-2, dim2=-1).sum(-1)) / (n * (n - 1))


@in_float32
def linear_mmd2(x: Tensor, y: Tensor, estimator: Estimator = "u") -> Tensor:
    """MMD² of the linear kernel from mean embeddings, in O(N).

    V = ‖x̄ − ȳ‖², and U = V − tr Σ̂_x / N − tr Σ̂_y / M with the unbiased covariances Σ̂. Leading dimensions are
    independent problems: (…, N, F) and (…, M, F) give (…).
    """
    v = (x.mean(-2) - y.mean(-2)).square().sum(-1)
    if estimator == "v":
        return v
    return v - sum(a.var(-2).sum(-1) / a.shape[-2] for a in (x, y))


def witness(z: Tensor, x: Tensor, y: Tensor, kernel: Kernel | None = None) -> Tensor:
    """The witness f(z) = E k(x, z) − E k(y, z) (Gretton et al., 2012, sec. 2.3).

    Args:
        z: Where to evaluate, with shape (…, N, F).
        x: Samples of P, with shape (…, M, F).
        y: Samples of Q, with shape (…, M', F).
        kernel: The base kernel; linear by default.

    Returns:
        The values, with shape (…, N).
    """
    return mmd_witness(x, y, kernel)(z)


@in_float32
def mmd_witness(x: Tensor, y: Tensor, kernel: Kernel | None = None) -> Witness:
    """The witness of MMD, to be evaluated later; with the linear kernel its only point is Δ = x̄ − ȳ."""
    kernel = (kernel or LinearKernel()).fitted(x, y)
    if isinstance(kernel, LinearKernel):
        delta = x.mean(-2, keepdim=True) - y.mean(-2, keepdim=True)
        return Witness(kernel, delta, torch.ones_like(delta[..., 0]))
    n, m = x.shape[-2], y.shape[-2]
    weights = torch.cat([x.new_full(x.shape[:-1], 1 / n), y.new_full(y.shape[:-1], -1 / m)], dim=-1)
    return Witness(kernel, torch.cat([x, y], dim=-2), weights)


@in_float32
def linear_witness(z: Tensor, delta: Tensor) -> Tensor:
    """f(z) = ⟨z, Δ⟩ from the difference of mean embeddings; (…, N, F) and (…, F) give (…, N)."""
    return (z * delta.unsqueeze(-2)).sum(-1)


def kale(x: Tensor, y: Tensor, kernel: Kernel | None = None, lam: float = 1.0) -> Tensor:
    """KALE(P ‖ Q) from samples, through its dual (Glaser et al., 2021, sec. 2).

    With one dual variable per sample of Q, the density ratio w_j ≈ (dP/dQ)(y_j) > 0,

        KALE = (1 + λ) min_w { mean_j (w_j log w_j − w_j + 1) + ‖mean_i k(x_i, ·) − mean_j w_j k(y_j, ·)‖²_H / (2λ) }

    which is never negative, ½ MMD² (V-statistic) for λ → ∞ and the Kullback–Leibler divergence for λ → 0. First and
    second derivatives in x, y are exact. The cost is O((N + M)² F + M³).

    Args:
        x: Samples of P, with shape (…, N, F).
        y: Samples of Q, with shape (…, M, F).
        kernel: The base kernel; linear by default.
        lam: λ > 0.

    Returns:
        The divergence, with shape (…), in float32 or better.

    Raises:
        ValueError: If λ is not positive.
        FloatingPointError: If the dual cannot be solved, because λ is too small for these samples.
    """
    kernel = (kernel or LinearKernel()).fitted(x, y)
    h = kale_dual(x, y, kernel, lam)
    w = h.exp()
    entropy = (w * h - h.expm1()).mean(-1)
    return (1 + lam) * (entropy + 0.5 * lam * kale_witness_of(h, x, y, kernel, lam).norm().square())


def kale_witness(x: Tensor, y: Tensor, kernel: Kernel | None = None, lam: float = 1.0) -> Witness:
    """The maximiser h = (mean_i k(x_i, ·) − mean_j w_j k(y_j, ·)) / λ of KALE(P ‖ Q), with log w from `kale_dual`.

    The first variation of KALE in P is (1 + λ) h, which tends to the witness of MMD for λ → ∞. Arguments as `kale`.
    """
    kernel = (kernel or LinearKernel()).fitted(x, y)
    return kale_witness_of(kale_dual(x, y, kernel, lam), x, y, kernel, lam)


def kale_witness_of(h: Tensor, x: Tensor, y: Tensor, kernel: Kernel, lam: float) -> Witness:
    """The witness that belongs to a solved dual h = log w, with shape (…, M)."""
    weights = torch.cat([h.new_full(x.shape[:-1], 1 / x.shape[-2]), -h.exp() / y.shape[-2]], dim=-1) / lam
    return Witness(kernel, torch.cat([x, y], dim=-2).to(h), weights)


@in_float32
def kale_dual(x: Tensor, y: Tensor, kernel: Kernel, lam: float, max_iterations: int = 500) -> Tensor:
    """The dual variable of KALE in logarithms: log w_j = h(y_j), with shape (…, M).

    h solves h_j + (mean_l k(y_j, y_l) e^{h_l} − mean_i k(y_j, x_i)) / λ = 0, by damped Newton steps in float64. The
    last step is differentiable, which makes the first derivative of h exact. Arguments and errors as `kale`.
    """
    if lam <= 0:
        raise ValueError(f"KALE needs λ > 0; got {lam}")
    m = y.shape[-2]
    gram, mean = kernel(y, y) / m, kernel(y, x).mean(-1)
    with torch.no_grad():
        k, c = gram.double(), mean.double()
        identity, h = torch.eye(m, dtype=k.dtype, device=k.device), torch.zeros_like(c)
        for _ in range(max_iterations):
            residual = h + ((k @ h.exp()[..., None]).squeeze(-1) - c) / lam
            jacobian = identity + k * h.exp()[..., None, :] / lam
            step = torch.linalg.solve(jacobian, residual)
            largest = step.abs().amax()
            # exp grows too fast for a longer step; near the solution this is plain Newton
            h = h - step / step.abs().amax(-1, keepdim=True).clamp(min=1)
            if largest < 1e-9:
                break
        else:
            raise FloatingPointError(f"the dual of KALE did not converge at λ = {lam}; use a larger λ")
    residual = h + ((gram.double() @ h.exp()[..., None]).squeeze(-1) - mean.double()) / lam
    return (h - torch.linalg.solve(jacobian, residual)).to(gram)


@dataclass(frozen=True)
class Discrepancy:
    """What training maximises and the flow descends: a value and its witness, of features x ~ P and y ~ Q.

    Attributes:
        kernel: The base kernel on features.
    """

    kernel: Kernel = field(default_factory=LinearKernel)

    name: ClassVar[str]

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        """The discrepancy, with shape (…), of (…, N, F) and (…, M, F)."""
        raise NotImplementedError

    def witness(self, x: Tensor, y: Tensor) -> Witness:
        """The first variation in P, as an element of the kernel's feature space."""
        raise NotImplementedError

    @property
    def needs_means_only(self) -> bool:
        """Whether x and y enter the witness through their means alone."""
        return False


@dataclass(frozen=True)
class MMD(Discrepancy):
    """MMD²: its U-statistic, and the witness f."""

    name = "mmd2"

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        return mmd2(x, y, self.kernel, estimator="u")

    def witness(self, x: Tensor, y: Tensor) -> Witness:
        return mmd_witness(x, y, self.kernel)

    @property
    def needs_means_only(self) -> bool:
        return isinstance(self.kernel, LinearKernel)


@dataclass(frozen=True)
class KALE(Discrepancy):
    """KALE at λ, and (1 + λ) h. With the linear kernel h is the network's last layer, solved for instead of trained."""

    lam: float = 1.0

    name = "kale"

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        return kale(x, y, self.kernel, self.lam)

    def witness(self, x: Tensor, y: Tensor) -> Witness:
        return kale_witness(x, y, self.kernel, self.lam).scaled(1 + self.lam)


def get_discrepancy(
    name: str = "mmd",
    kernel: str = "linear",
    bandwidth: float | list[float] | str = "median",
    alpha: float = 1.0,
    lam: float = 1.0,
) -> Discrepancy:
    """A discrepancy by plain values, as configurations hold them.

    Args:
        name: "mmd" or "kale".
        kernel: "linear", "gaussian" or "rational-quadratic".
        bandwidth: Of the Gaussian and the rational-quadratic kernel; "median" for the Gaussian only.
        alpha: α of the rational-quadratic kernel.
        lam: λ of KALE.

    Raises:
        ValueError: If there is no such discrepancy or kernel, or a value is out of range.
    """
    options = {"linear": {}, "gaussian": {"bandwidth": bandwidth}}
    built = get_kernel(kernel, **options.get(kernel, {"alpha": alpha, "bandwidth": bandwidth}))
    if name == "mmd":
        return MMD(built)
    if name != "kale":
        raise ValueError(f"no discrepancy {name!r}; choose mmd or kale")
    if lam <= 0:
        raise ValueError(f"KALE needs λ > 0; got {lam}")
    return KALE(built, lam)
