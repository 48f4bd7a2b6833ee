"""Many networks of one architecture as one: the parameters of all side by side, and their forward passes in one."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from unsharp.runtime import is_host

WIDER: dict[type[nn.Module], tuple[str, ...]] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), ("in_channels", "out_channels", "groups")),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), ("num_features",)),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), ("num_features",)),
    nn.GroupNorm: ("num_groups", "num_channels"),
}
"""Layers that serve M networks when these counts are M times as large."""


class CannotStack(Exception):
    """Why a network cannot be stacked in some form; the text goes behind the form's name."""


class Form(ABC):
    """M networks of one architecture, whose parameters and buffers lie in common tensors.

    Args:
        template: A network of that architecture, on the device; its own weights are not taken over.
        n: How many networks, at least 1.

    Attributes:
        leaves: The common tensors of the trainable parameters by name, member by member along the first dimension.
        views: Every parameter and buffer by the name it has in the template, (n, *its shape), sharing memory.
        stored: The tensors that hold all of it, each with memory of its own.

    Raises:
        CannotStack: if this form does not fit the architecture.
    """

    leaves: dict[str, nn.Parameter]
    views: dict[str, Tensor]
    stored: dict[str, Tensor]

    @abstractmethod
    def train(self, training: bool) -> None:
        """Put all networks into training or evaluation mode."""

    @abstractmethod
    def logits(self, inputs: Tensor) -> Tensor:
        """(n, B, classes) from a batch for each network, (n, B, ...)."""

    @abstractmethod
    def shared_logits(self, inputs: Tensor) -> Tensor:
        """(n, B, classes) from one batch for all, (B, ...)."""

    @torch.no_grad()
    def put(self, member: int, model: nn.Module) -> None:
        """Take over the weights and buffers of a network of the template's architecture as those of `member`."""
        for name, tensor in tensors_of(model):
            self.views[name][member].copy_(tensor)

    @torch.no_grad()
    def take(self, member: int, model: nn.Module) -> None:
        """Write the weights and buffers of `member` into a network of the template's architecture."""
        for name, tensor in tensors_of(model):
            tensor.copy_(self.views[name][member])


class Mapped(Form):
    """The networks as torch.vmap maps one of them over the stacked parameters: of any architecture that vmap knows.

    It lays out memory by its own rules; channels-last order has no say in it.
    """

    def __init__(self, template: nn.Module, n: int) -> None:
        self._template = copy.deepcopy(template)
        self.views = {name: _repeated(tensor, n) for name, tensor in tensors_of(template)}
        self.stored = self.views
        trainable = [name for name, p in template.named_parameters() if p.requires_grad]
        self.leaves = {name: nn.Parameter(self.views[name]) for name in trainable}

    def train(self, training: bool) -> None:
        self._template.train(training)

    def logits(self, inputs: Tensor) -> Tensor:
        return torch.vmap(self._one)(self._tensors(), inputs)

    def shared_logits(self, inputs: Tensor) -> Tensor:
        return torch.vmap(self._one, in_dims=(0, None))(self._tensors(), inputs)

    def _one(self, tensors: dict[str, Tensor], inputs: Tensor) -> Tensor:
        if not is_host(inputs.device):
            return torch.func.functional_call(self._template, tensors, (inputs,))
        with sdpa_kernel(SDPBackend.MATH):  # vmap knows a host's quick attention only as a loop over the members
            return torch.func.functional_call(self._template, tensors, (inputs,))

    def _tensors(self) -> dict[str, Tensor]:
        return {**self.views, **self.leaves}


class Grouped(Form):
    """The networks as one with M times the channels: convolutions in groups, linear layers as batched products.

    Between the layers dimension 1 holds the channels of the first network, then those of the second, and so on.
    Whatever acts on each channel alone (activations, pooling, shortcuts, flattening) is then right as it stands. An
    architecture for which that does not hold must be found out by a comparison with the networks themselves.
    """

    def __init__(self, template: nn.Module, n: int, *, channels_last: bool = True) -> None:
        self._n = n
        self._channels_last = channels_last
        tied = len(list(template.parameters())) < len(list(template.named_parameters(remove_duplicate=False)))
        if tied:
            raise CannotStack("two layers share a weight")
        self._made: dict[int, nn.Module] = {}
        self.leaves, self.views, self.stored = {}, {}, {}
        self._module = self._widened(template, "")

    def train(self, training: bool) -> None:
        self._module.train(training)

    def logits(self, inputs: Tensor) -> Tensor:
        if self._channels_last and inputs.ndim == 5:
            n, size, channels, height, width = inputs.shape
            joined = inputs.permute(1, 3, 4, 0, 2).reshape(size, height, width, n * channels).permute(0, 3, 1, 2)
        else:
            joined = inputs.transpose(0, 1).flatten(1, 2)
        logits = self._module(joined)
        if logits.ndim != 2 or logits.shape[1] % self._n:
            raise CannotStack(f"the outputs have the shape {tuple(logits.shape)}")
        return logits.unflatten(1, (self._n, -1)).transpose(0, 1)

    def shared_logits(self, inputs: Tensor) -> Tensor:
        return self.logits(inputs.expand(self._n, *inputs.shape))

    def _widened(self, module: nn.Module, path: str) -> nn.Module:
        """The module as it stands for all networks; called again on the same one it gives the same."""
        if id(module) not in self._made:
            self._made[id(module)] = self._made_wide(module, path)
        return self._made[id(module)]

    def _made_wide(self, module: nn.Module, path: str) -> nn.Module:
        kind = type(module)
        if kind in WIDER:
            wide = _without_tensors(module)
            wide.__dict__ |= {name: self._n * module.__dict__[name] for name in WIDER[kind]}
        elif isinstance(module, nn.Linear) and kind is nn.Linear:
            wide = _Linear(self._n, module.in_features)
        elif module._parameters or module._buffers:
            raise CannotStack(f"it has no form for {path or 'the network'}, a {kind.__name__} with tensors of its own")
        else:
            return self._with_children(module, path)
        self._take_tensors(module, wide, path)
        return wide

    def _with_children(self, module: nn.Module, path: str) -> nn.Module:
        wide = copy.copy(module)
        wide.__dict__ = dict(module.__dict__)
        wide._modules = {
            name: None if child is None else self._widened(child, f"{path}.{name}".lstrip("."))
            for name, child in module._modules.items()
        }
        return wide

    def _take_tensors(self, module: nn.Module, wide: nn.Module, path: str) -> None:
        for name, tensor, is_parameter in _own_tensors(module):
            full = f"{path}.{name}".lstrip(".")
            if tensor.ndim == 0:  # a counter of batches, the same for all
                common = tensor.detach().clone()
                self.views[full] = common.expand(self._n)
            else:
                common = self._common(tensor)
                self.views[full] = common.unflatten(0, (self._n, -1))
                if isinstance(wide, _Linear):
                    common = self.views[full]
            self.stored[full] = common
            if not is_parameter:
                wide.register_buffer(name, common, persistent=name not in module._non_persistent_buffers_set)
                continue
            parameter = nn.Parameter(common, requires_grad=tensor.requires_grad)
            wide.register_parameter(name, parameter)
            if tensor.requires_grad:
                self.leaves[full] = parameter

    def _common(self, tensor: Tensor) -> Tensor:
        """(n · d₀, d₁, ...) for a tensor of shape (d₀, d₁, ...), 4-D ones in the memory order of the inputs."""
        common = _repeated(tensor, self._n).flatten(0, 1)
        if common.ndim == 4 and self._channels_last:
            return common.contiguous(memory_format=torch.channels_last)
        return common


class _Linear(nn.Module):
    """The linear layers of all networks: (B, n · features) to (B, n · outputs)."""

    weight: Tensor
    bias: Tensor

    def __init__(self, n: int, features: int) -> None:
        super().__init__()
        self._n, self._features = n, features
        self.register_parameter("bias", None)

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.ndim != 2 or inputs.shape[1] != self._n * self._features:
            raise CannotStack(f"a linear layer met inputs of the shape {tuple(inputs.shape)}")
        apart = inputs.reshape(len(inputs), self._n, self._features).transpose(0, 1)
        weights = self.weight.transpose(1, 2)
        out = torch.bmm(apart, weights) if self.bias is None else torch.baddbmm(self.bias[:, None], apart, weights)
        return out.transpose(0, 1).flatten(1)


Behaviour = dict[tuple[str, str], Tensor]


def check_form(
    make: Callable[[nn.Module, int], Form], models: Sequence[nn.Module], inputs: Tensor, tolerance: float
) -> None:
    """Compare a form with the networks themselves, in a training step and in evaluation.

    Args:
        make: Makes the form from a template and a number of networks.
        models: A few networks with different weights; they are changed.
        inputs: (m, b, ...), a few inputs for each of them.
        tolerance: Largest difference of logits, gradients or buffers, relative to the largest entry of that sort.

    Raises:
        CannotStack: if the form cannot be made, or differs.
    """
    try:
        form = make(models[0], len(models))
        for j, model in enumerate(models):
            form.put(j, model)
        buffers = [name for name, _ in models[0].named_buffers()]
        found = _behaviour_of_form(form, buffers, inputs, inputs[-1])
    except CannotStack:
        raise
    except Exception as error:  # whatever a network does in a form that it was not written for
        raise CannotStack((str(error).strip() or type(error).__name__).splitlines()[0]) from None
    each = [_behaviour_of_network(model, x, inputs[-1]) for model, x in zip(models, inputs)]
    expected = {key: torch.stack([behaviour[key] for behaviour in each]) for key in each[0]}
    if expected.keys() != found.keys():
        raise CannotStack("its gradients do not reach the same weights")
    largest: dict[str, float] = {}
    for (sort, _), tensor in expected.items():
        largest[sort] = max(largest.get(sort, 0.0), float(tensor.abs().max()) if tensor.numel() else 0.0)
    for (sort, name), tensor in expected.items():
        other = found[sort, name]
        if tensor.shape != other.shape or not bool(((tensor - other).abs() <= tolerance * largest[sort]).all()):
            raise CannotStack(f"{sort}{name and ' of '}{name} are not those of the networks alone")


def _behaviour_of_network(model: nn.Module, inputs: Tensor, shared: Tensor) -> Behaviour:
    logits = model.train()(inputs)
    _trial_loss(logits).backward()
    found = {("logits", ""): logits.detach()}
    found |= {("gradients", name): p.grad for name, p in model.named_parameters() if p.grad is not None}
    found |= {("buffers", name): buffer for name, buffer in model.named_buffers()}
    model.eval()
    with torch.no_grad():
        return found | {("logits in evaluation", ""): model(inputs), ("logits of one batch", ""): model(shared)}


def _behaviour_of_form(form: Form, buffers: Sequence[str], inputs: Tensor, shared: Tensor) -> Behaviour:
    form.train(True)
    logits = form.logits(inputs)
    _trial_loss(logits).backward()
    found = {("logits", ""): logits.detach()}
    for name, leaf in form.leaves.items():
        if leaf.grad is not None:
            found["gradients", name] = leaf.grad.unflatten(0, (len(inputs), -1)).reshape(form.views[name].shape)
    found |= {("buffers", name): form.views[name] for name in buffers}
    form.train(False)
    with torch.no_grad():
        apart, one = form.logits(inputs), form.shared_logits(shared)
    return found | {("logits in evaluation", ""): apart, ("logits of one batch", ""): one}


def _trial_loss(logits: Tensor) -> Tensor:
    """Something that depends on every logit in another way."""
    return (logits * torch.linspace(-1, 1, logits.shape[-1], device=logits.device).to(logits.dtype)).sum() + (
        logits.square().sum()
    )


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers of a network by name, each once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    for tensors, are_parameters in ((module._parameters, True), (module._buffers, False)):
        for name, tensor in tensors.items():
            if tensor is not None:
                yield name, tensor, are_parameters


def _without_tensors(module: nn.Module) -> nn.Module:
    """A copy of a layer with its settings and neither weights nor buffers."""
    bare = copy.copy(module)
    bare.__dict__ = dict(module.__dict__)
    bare._parameters = dict.fromkeys(module._parameters)
    bare._buffers = dict.fromkeys(module._buffers)
    return bare


def _repeated(tensor: Tensor, n: int) -> Tensor:
    return tensor.detach().expand(n, *tensor.shape).clone(memory_format=torch.contiguous_format)
