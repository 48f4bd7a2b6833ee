"""Which weights belong to normalisation layers: torch's own, and those that other libraries write by themselves."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

LAYERS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
"""BatchNorm and InstanceNorm, lazy and synchronised ones too, are kinds of _NormBase."""
NAMED = re.compile(r"(?:Norm|(?i:batch|layer|group|instance|rms)_?norm)(?![a-z])")
"""Class names such as LlamaRMSNorm, T5LayerNorm, RmsNorm, FrozenBatchNorm2d; but not Normalize, NormalHead."""


def normalisation_weights(model: nn.Module, params: Sequence[Tensor]) -> list[bool]:
    """Which of the tensors belong to a normalisation layer of the model.

    A layer is known by its class, or, where it derives from none of torch's, by the name of its class; it then has no
    layers of its own within it, and of its weights those count that have one entry per channel.

    Args:
        model: The network.
        params: Some of its parameters.

    Returns:
        Per tensor whether it belongs to such a layer, under whatever other name it may be known as well.
    """
    found: set[int] = set()
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, LAYERS):
            found |= {id(p) for p in own}
        elif NAMED.search(type(module).__name__) and len(own) == len(list(module.parameters())):
            found |= {id(p) for p in own if p.numel() == max(p.shape, default=1)}
    return [id(p) in found for p in params]
