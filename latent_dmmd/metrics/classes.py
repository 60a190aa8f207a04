"""Whether generated images are of the class that was asked for."""

import torch
import torch.nn.functional as F
from torch import Tensor


class LinearClassifier:
    """Logistic regression on features, as fitted by L-BFGS.

    Args:
        features: Of the images to learn from, with shape (N, d).
        labels: Their classes, with shape (N), from 0 to C − 1.
        weight_decay: λ of the penalty ½ λ ‖W‖² on standardised features.
    """

    def __init__(self, features: Tensor, labels: Tensor, weight_decay: float = 0.1) -> None:
        self.mean, self.std = features.mean(0), features.std(0).clamp(min=1e-6)
        x, num_classes = (features - self.mean) / self.std, int(labels.max()) + 1
        self.weight = torch.zeros(num_classes, x.shape[1], device=x.device, requires_grad=True)
        self.bias = torch.zeros(num_classes, device=x.device, requires_grad=True)
        optimizer = torch.optim.LBFGS([self.weight, self.bias], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(x @ self.weight.T + self.bias, labels)
            value = value + 0.5 * weight_decay * self.weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)

    @torch.no_grad()
    def __call__(self, features: Tensor) -> Tensor:
        """Classes of features (N, d), with shape (N)."""
        return ((features - self.mean) / self.std @ self.weight.T + self.bias).argmax(1)


def class_agreement(names: list[str], asked: Tensor, found: Tensor) -> dict[str, float]:
    """How often the class found is the one that was asked for.

    Args:
        names: Names of the classes.
        asked: Classes asked for, with shape (N).
        found: Classes found, with shape (N).

    Returns:
        The share of agreement in every class by its name, and their mean as "classes". Where all names have as many
        words, two or more, also the mean share that agrees in each word: "defective or intact".
    """
    shares = {name: (found[asked == i] == i).double().mean().item() for i, name in enumerate(names)}
    result = {"classes": sum(shares.values()) / len(shares)} | shares
    words = [name.split() for name in names]
    if {len(w) for w in words} == {len(words[0])} and len(words[0]) > 1:
        for column in zip(*words):
            kinds = sorted(set(column))
            of = torch.tensor([kinds.index(word) for word in column], device=found.device)
            each = [(of[found[asked == i]] == of[i]).double().mean() for i in range(len(names))]
            result[" or ".join(kinds)] = torch.stack(each).mean().item()
    return result
