"""Building blocks of the networks in test_life.py, and events that change a network. pick selects what is changed."""

from itertools import chain

import torch
from torch import nn

DTYPES = [torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]
BUFFERS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
           torch.float32, torch.float64, torch.complex64]  # fmt: skip


def named(net):
    return dict(chain(net.named_parameters(remove_duplicate=False), net.named_buffers(remove_duplicate=False)))


def is_expanded(tensor):
    """Whether several elements share one memory location."""
    return any(stride == 0 for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)


def randomise(tensors):
    for tensor in tensors:
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            continue
        if is_expanded(tensor):
            continue
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.normal_()
        elif tensor.dtype == torch.bool:
            tensor.bernoulli_(0.5)
        else:
            tensor.random_(0, 100)


class Net(nn.Module):
    """Its forward returns the values that it reads."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(4, 4)
        self.none = None

    def forward(self):
        return {name: tensor.clone() for name, tensor in named(self).items()}

    def has_odd(self):
        """Whether it has tensors that DistributedDataParallel rejects."""
        return any(p.is_complex() or p.numel() == 0 for p in self.parameters())


# ---------------------------------------------------------------- blocks: how a network is built


def linear(net, name):
    net.add_module(name, nn.Linear(4, 4))


def norm(net, name):
    net.add_module(name + "norm", nn.BatchNorm1d(4))


def convolution(net, name):
    net.add_module(name, nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last))


def frozen(net, name):
    net.add_module(name, nn.Linear(4, 4, bias=False).requires_grad_(False))


def tied(net, name):
    layer = nn.Linear(4, 4)
    layer.weight = net.base.weight
    net.add_module(name, layer)


def shared(net, name):
    net.add_module(name, net.base)


def nested(net, name):
    net.add_module(name, nn.Sequential(nn.Linear(4, 2), nn.ModuleDict({"norm": nn.BatchNorm1d(2)}), nn.Identity()))


def every_buffer(net, name):
    layer = nn.Module()
    for i, dtype in enumerate(BUFFERS):
        layer.register_buffer(f"f{i}", torch.ones(3, 4, dtype=dtype), persistent=i % 3 > 0)
    net.add_module(name, layer)


def scalars_and_empties(net, name):
    layer = nn.Module()
    layer.scale = nn.Parameter(torch.tensor(1.5))
    layer.empty = nn.Parameter(torch.empty(0, 3))
    layer.register_buffer("count", torch.tensor(3))
    layer.register_buffer("nothing", torch.empty(2, 0))
    layer.register_buffer("later", None)
    net.add_module(name, layer)


def transposed(net, name):
    net.add_module(name, nn.Linear(4, 4))
    with torch.no_grad():
        net.get_submodule(name).weight.t_()


def views(net, name):
    """Two adjacent views of one tensor."""
    layer, both = nn.Module(), torch.randn(2, 4, 4)
    layer.one, layer.other = nn.Parameter(both[0]), nn.Parameter(both[1])
    net.add_module(name, layer)


def large(net, name):
    net.register_buffer(name, torch.randn(16384 + 18))


BLOCKS = [linear, norm, convolution, frozen, tied, shared, nested, every_buffer, scalars_and_empties, transposed,
          views, large]  # fmt: skip


# ---------------------------------------------------------------- events


def picked(things, pick):
    things = list(things)
    return things[pick % len(things)]


def a_parameter(net, pick, fits=lambda tensor: True):
    return picked([p for _, p in sorted(net.named_parameters()) if fits(p)] or [net.base.weight], pick)


def a_layer(net, pick):
    """(parent module, name, layer)."""
    return picked([(m, n, c) for m in net.modules() for n, c in m._modules.items() if isinstance(c, nn.Linear)], pick)


def has_weights(*layers):
    """Whether all layers have plain, unparametrized weights."""
    return all("weight" in layer._parameters for layer in layers)


def another_dtype(net, pick):
    net.to(picked(DTYPES, pick))


def another_dtype_of_one(net, pick):
    parameter = a_parameter(net, pick, torch.is_floating_point)
    parameter.data = parameter.data.to(picked(DTYPES, pick))


def to_channels_last(net, pick):
    net.to(memory_format=torch.channels_last if pick % 2 else torch.contiguous_format)


def new_data(net, pick):
    parameter = a_parameter(net, pick)
    parameter.data = parameter.data + 1


def the_same_data_again(net, pick):
    parameter = a_parameter(net, pick)
    parameter.data = parameter.data


def other_shape(net, pick):
    if net.base.bias is not None:
        net.base.bias.data = torch.randn(pick % 5 + 1, dtype=net.base.bias.dtype)


def smaller_at_the_address(net, pick):
    if net.base.bias is not None:
        net.base.bias.data = net.base.bias.data[: max(1, len(net.base.bias) - 1)]


def other_dtype_at_the_address(net, pick):
    bias = net.base.bias
    if bias is not None and bias.dtype in (torch.float16, torch.bfloat16):
        bias.data = bias.data.view(torch.bfloat16 if bias.dtype == torch.float16 else torch.float16)
        bias.data.zero_()


def set_storage(net, pick):
    parameter = a_parameter(net, pick)
    with torch.no_grad():
        parameter.set_(torch.ones(parameter.shape, dtype=parameter.dtype))


def transpose(net, pick):
    with torch.no_grad():
        if has_weights(net.base):
            net.base.weight.t_()


def expand(net, pick):
    parameter = a_parameter(net, pick)
    parameter.data = torch.ones((), dtype=parameter.dtype).expand(parameter.shape)


def strided(net, pick):
    parameter = a_parameter(net, pick)
    parameter.data = torch.ones(*parameter.shape, 2, dtype=parameter.dtype)[..., 1]


def misaligned(net, pick):
    parameter = a_parameter(net, pick)
    parameter.data = torch.ones(parameter.numel() + 1, dtype=parameter.dtype)[1:].view(parameter.shape)


def negative(net, pick):
    """A lazily negated view."""
    bag = [(m, n, b) for m in net.modules() for n, b in m._buffers.items() if b is not None and b.is_complex()]
    if bag:
        module, name, buffer = picked(bag, pick)
        module._buffers[name] = buffer.conj()


def replace_layer(net, pick):
    parent, name, layer = a_layer(net, pick)
    parent._modules[name] = nn.Linear(layer.in_features, layer.out_features)


def delete_and_make_a_layer(net, pick):
    parent, name, layer = a_layer(net, pick)
    parent.__delattr__(name)
    del layer
    parent.add_module(name, nn.Linear(4, 4 - pick % 2))


def another_layer(net, pick):
    net.add_module(f"more{pick % 3}", nn.Linear(4, pick % 3 + 1))


def remove_a_layer(net, pick):
    net._modules.pop(f"more{pick % 3}", None)


def no_bias(net, pick):
    _, _, layer = a_layer(net, pick)
    layer.bias = None if layer.bias is not None else nn.Parameter(torch.randn(len(layer.weight)))


def load(net, pick):
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net.load_state_dict(state, assign=pick % 2 == 0 or any(map(is_expanded, net.state_dict().values())))


def replace_dict_of_parameters(net, pick):
    _, _, layer = a_layer(net, pick)
    layer._parameters = {n: p if p is None else nn.Parameter(p.detach() + 1) for n, p in layer._parameters.items()}


def replace_dict_of_modules(net, pick):
    net._modules = dict(net._modules)
    net._modules["base"] = nn.Linear(4, 4)


def replace_buffer(net, pick):
    bag = [(m, n, b) for m in net.modules() for n, b in m._buffers.items() if b is not None]
    if bag:
        module, name, buffer = picked(bag, pick)
        module._buffers[name] = buffer.clone()


def other_dtype_of_a_buffer(net, pick):
    bag = [(m, n, b) for m in net.modules() for n, b in m._buffers.items() if b is not None]
    if bag:
        module, name, buffer = picked(bag, pick)
        module._buffers[name] = buffer.to(picked(BUFFERS, pick)) if not buffer.is_complex() else buffer.clone()


def exchange_two(net, pick):
    """Exchange two parameters under their names."""
    other = a_layer(net, pick)[2]
    if has_weights(net.base, other):
        net.base.weight, other.weight = other.weight, net.base.weight


def swap_tensors(net, pick):
    parameter = a_parameter(net, pick)
    try:
        torch.utils.swap_tensors(parameter, nn.Parameter(torch.ones_like(parameter)))
    except RuntimeError as error:  # something else refers to it, such as DDP's reducer
        assert "swap" in str(error) or "use_count" in str(error), error  # noqa: PT017


def requires_grad(net, pick):
    net.requires_grad_(pick % 2 == 0)


def parametrize(net, pick):
    """Never undone: torch shares a parametrized layer's class with its copies, and removal would break those."""
    _, _, layer = a_layer(net, pick)
    if has_weights(layer):
        how = nn.utils.parametrizations.weight_norm if pick % 3 else nn.utils.parametrizations.spectral_norm
        how(layer)


def tie(net, pick):
    _, _, layer = a_layer(net, pick)
    if has_weights(net.base, layer):
        layer.weight = net.base.weight


def untie(net, pick):
    if has_weights(net.base):
        net.base.weight = nn.Parameter(net.base.weight.detach().clone())


def not_finite(net, pick):
    parameter = a_parameter(net, pick)
    if parameter.numel() and not is_expanded(parameter):
        parameter.detach()[(0,) * parameter.dim()] = [torch.nan, torch.inf][pick % 2]


def another_class(net, pick):
    net.__class__ = type(net.__class__.__name__, (Net,), {"__module__": __name__}) if pick % 9 == 0 else Net


STRUCTURAL = [other_shape, smaller_at_the_address, delete_and_make_a_layer, another_layer, remove_a_layer, no_bias,
              parametrize, tie, untie, exchange_two, transpose]  # fmt: skip
EVENTS = [another_dtype, another_dtype_of_one, to_channels_last, new_data, the_same_data_again,
          other_dtype_at_the_address, set_storage, expand, strided, misaligned, negative, replace_layer, load,
          replace_dict_of_parameters, replace_dict_of_modules, replace_buffer, other_dtype_of_a_buffer, swap_tensors,
          requires_grad, not_finite, *STRUCTURAL]  # fmt: skip
# These write to the existing memory.
WRITING = [not_finite, other_dtype_at_the_address]
