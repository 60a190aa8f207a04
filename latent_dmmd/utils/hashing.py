"""Hashes that tell what was made with which weights."""

import hashlib

from torch import nn


def module_hash(module: nn.Module) -> str:
    """A hash of a network's weights and buffers, 16 hexadecimal digits: what is kept of its outputs depends on it."""
    module = getattr(module, "_orig_mod", module)  # of a compiled one
    digest = hashlib.sha256(type(module).__name__.encode())
    for name, weight in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
