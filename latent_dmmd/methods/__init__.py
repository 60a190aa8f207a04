"""What can be trained: one module per method, each with its own keys, and the registry that finds them by name.

`METHODS["dmmd"]` is the class; `objective.name` in a configuration chooses it. Adding a method takes one module with a
subclass of `Method` under `@register`.
"""

from latent_dmmd.methods import ddpm, dmmd, flow_matching, mmd_gan, one_step, witness_matching  # noqa: F401  registered
from latent_dmmd.methods.base import METHODS, Method, MethodConfig, NetConfig, build_method, register

__all__ = ["METHODS", "Method", "MethodConfig", "NetConfig", "build_method", "register"]
