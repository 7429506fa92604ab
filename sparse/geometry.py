"""Geometry of a network and what its layers cost under each convention of counting.

The geometry comes from tracing the model once on the meta device, so any network of convolutions
and matrix products is costed without a table and without computing anything. Three conventions:

- "published": the counting behind the tables of the RigL paper and its code. Multiplies and adds
  of every convolution and linear layer, plus one addition per output for a bias (whether the layer
  has one or not) and one multiplication per output for a ReLU (also after the last layer). Two
  quirks of that counter are kept, because the printed figures contain them: the padding of the
  strided first convolution and of strided depthwise ones is counted twice, so that they are costed
  with a larger output (115 x 115 instead of 112 x 112 for the first layer of ResNet-50); and a
  depthwise convolution has one output channel as far as bias and ReLU go. Verified against the
  original counter for ResNet-50 (v1.5) and MobileNet-v1; for other models it is an extrapolation.
- "true": the same operations in the real geometry.
- "macs": multiply-accumulates of the weights alone, in the real geometry.

Normalization, pooling, residual additions, softmax and products of two activations (attention) are
never counted. Everything is for one image.

A weight is counted as often as it is applied: the projections of attention once per token, those of
a recurrent layer once per time step. A parameter that enters no product as it is costs 0 operations
and only bytes: embeddings, which are looked up, parameters that are added or multiplied entry by
entry, and those from which a weight is computed first.
"""

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from .methods.layers import included
from .topology.blocks import blocks_of, check_block

Convention = Literal["published", "true", "macs"]
CONVENTIONS: tuple[Convention, ...] = ("published", "true", "macs")

_BITS_PER_VALUE = 32
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)
_ATEN = torch.ops.aten
_PRODUCTS = (_ATEN.mm, _ATEN.bmm, _ATEN.addmm, _ATEN.baddbmm, _ATEN.mv, _ATEN.addmv)
_COPIES = (_ATEN.clone, _ATEN._to_copy)  # as einsum makes them of a weight


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """Geometry of one weight tensor during one forward pass of one image."""

    name: str
    """Name of the parameter, such as "layer1.0.conv1.weight"."""
    shape: tuple[int, ...]
    macs: int
    """Multiply-accumulates of the dense layer."""
    out_elements: int
    """Elements of its output, summed over the calls of a layer that is used several times."""
    published_macs: int
    """`macs` with the quirks of the published counter."""
    published_out_elements: int
    num_biases: int
    published_num_biases: int

    @property
    def num_weights(self) -> int:
        """Number of weights, active or not."""
        return torch.Size(self.shape).numel()

    def flops(self, density: float = 1.0, convention: Convention = "published") -> float:
        """Return the operations of one forward pass with a share `density` of the weights.

        A dot product of v active weights is v multiplies and v - 1 adds; bias and ReLU add one
        each. "macs" counts multiply-accumulates.
        """
        if convention == "macs":
            return self.macs * density
        if convention == "true":
            return 2 * self.macs * density + self.out_elements
        return 2 * self.published_macs * density + self.published_out_elements

    def size_bits(
        self,
        density: float = 1.0,
        convention: Convention = "published",
        block: Sequence[int] | None = None,
    ) -> float:
        """Return the stored bits: 32 per active weight and bias, and 1 per mask entry if sparse.

        The mask has an entry per block of outputs and inputs, if the layer consists of such.
        "published" stores a bias per output channel of every layer (one in all for a depthwise
        convolution), as its counter did; the others store those that exist.
        """
        biases = self.published_num_biases if convention == "published" else self.num_biases
        blocks = blocks_of({self.name: self.shape}, check_block(block))
        mask = self.num_weights // blocks.numel(self.name) if density < 1 else 0
        return _BITS_PER_VALUE * (self.num_weights * density + biases) + mask


def trace_layers(
    model: nn.Module,
    image_size: int = 224,
    *,
    in_channels: int = 3,
    inputs: Sequence[Any] | None = None,
    include: Sequence[str] | None = None,
) -> list[LayerCost]:
    """Return the geometry of every weight that enters a product, in the order of execution.

    These are the weights of convolutions, linear and recurrent layers and attention. A copy of the
    model without storage runs once, in evaluation mode, on the meta device: nothing is computed and
    `model` is not touched. Weights of convolutions and linear layers that take no part in it
    (auxiliary heads) and those that only `include` names come last, with zero operations.

    Args:
        model: Any module that maps images (1, in_channels, image_size, image_size), or `inputs`.
        image_size: Side of the input in pixels.
        in_channels: Channels of the input.
        inputs: Positional arguments in place of an image, such as the tokens of one text; only the
            shapes and types of tensors matter. "One image" is one call with them.
        include: Globs of further weights to list, see `prunable`.

    Raises:
        ValueError: A glob matches nothing.
    """
    extra = included(model, include)
    # Filling the memo makes deepcopy take these tensors instead of copying the real ones.
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        memo[id(tensor)] = torch.empty_like(tensor, device="meta")
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(memo[id(parameter)], requires_grad=False)
    shadow = copy.deepcopy(model, memo).eval()
    dtype = next((p.dtype for p in shadow.parameters() if p.is_floating_point()), torch.float32)
    if inputs is None:
        inputs = [torch.empty(1, in_channels, image_size, image_size, dtype=dtype, device="meta")]
    recorder = _Recorder(shadow, extra)
    with torch.no_grad(), recorder:
        shadow(*tree_map_only(Tensor, lambda tensor: tensor.to("meta"), list(inputs)))
    return recorder.layers()


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the geometry of every product of an activation with a parameter."""

    def __init__(self, model: nn.Module, extra: Collection[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: dict[str, list[tuple[int, int, int, int]]] = {}
        self._modules = dict(model.named_modules())
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        # A transposed or sliced weight is still recognized by its storage.
        self._names = {_storage(p): name for name, p in model.named_parameters() if p.dim() >= 2}
        self._extra = extra
        self._copies: list[Tensor] = []  # kept, because a storage that is freed lends its address

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet is _ATEN.convolution:
            self._note_convolution(out, *args[:2], *args[3:9])
        elif packet in _PRODUCTS:
            self._note_product(out, *args[-2:])
        elif packet in _COPIES and (name := self._names.get(_storage(args[0]))):
            self._names[_storage(out)] = name
            self._copies.append(out)
        return out

    def _note(self, weight: Tensor, macs: int, outs: int, quirky: tuple[int, int]) -> None:
        if name := self._names.get(_storage(weight)):
            self._calls.setdefault(name, []).append((macs, outs, *quirky))

    def _note_product(self, out: Tensor, left: Tensor, right: Tensor) -> None:
        for weight in (left, right):
            macs = out.numel() * left.shape[-1]
            self._note(weight, macs, out.numel(), (macs, out.numel()))

    def _note_convolution(
        self,
        out: Tensor,
        image: Tensor,
        weight: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        transposed: bool,
        output_padding: Sequence[int],
        groups: int,
    ) -> None:
        positions = (image if transposed else out).shape[2:].numel()
        macs = weight.numel() * positions
        depthwise = weight.shape[1] == 1 and groups == image.shape[1] > 1
        counted = out.shape[2:].numel()
        if (depthwise or not self._calls) and not transposed and max(stride) > 1:
            counted = _twice_padded(image.shape[2:], weight.shape[2:], stride, padding)
        quirky_macs = macs if transposed else weight.numel() * counted
        quirky_outs = counted * (1 if depthwise else out.shape[1])
        self._note(weight, macs, out.numel(), (quirky_macs, quirky_outs))

    def layers(self) -> list[LayerCost]:
        known = dict.fromkeys(self._names.values())
        unused = [
            name
            for name in known
            if name not in self._calls and (self._is_layer(name) or name in self._extra)
        ]
        return [self._layer(name) for name in (*self._calls, *unused)]

    def _is_layer(self, name: str) -> bool:
        module = self._modules[name.rpartition(".")[0]]
        return isinstance(module, (nn.Linear, *_CONVOLUTIONS))

    def _num_biases(self, name: str) -> int:
        module, dot, own = name.rpartition(".")
        bias = own.replace("weight", "bias")
        shape = self._shapes.get(module + dot + bias, (0,))
        if own in ("q_proj_weight", "k_proj_weight", "v_proj_weight") and shape == (0,):
            # nn.MultiheadAttention holds the biases of all three in one parameter.
            return self._shapes.get(f"{module}{dot}in_proj_bias", (0,))[0] // 3
        return 0 if bias == own else torch.Size(shape).numel()

    def _layer(self, name: str) -> LayerCost:
        shape = self._shapes[name]
        module = self._modules[name.rpartition(".")[0]]
        transposed = getattr(module, "transposed", False)
        channels = module.out_channels if transposed else shape[0]
        depthwise = isinstance(module, _CONVOLUTIONS) and 1 < module.groups == module.in_channels
        num_biases = self._num_biases(name)
        calls = self._calls.get(name, [])
        if not calls and not self._is_layer(name):
            channels = 0
        macs, outs, quirky_macs, quirky_outs = (sum(c[i] for c in calls) for i in range(4))
        return LayerCost(
            name=name,
            shape=shape,
            macs=macs,
            out_elements=outs,
            published_macs=quirky_macs,
            published_out_elements=quirky_outs,
            num_biases=num_biases,
            published_num_biases=1 if depthwise else num_biases or channels,
        )


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _twice_padded(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> int:
    """Return the output positions of a convolution whose explicit padding is padded again."""
    positions = 1
    for n, k, s, p in zip(size, kernel, stride, padding, strict=True):
        positions *= ceil((n + 2 * p - k + 1 + 2 * (k // 2)) / s)
    return positions
