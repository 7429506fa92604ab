"""Sparse networks of other trainers under our names: pure functions from tensors to tensors.

Masks are bool, True = active, and are given for sparse layers only.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from image_classification.weights import Weights

# torchvision's name -> scope of the RigL repository's TensorFlow graph
_RESNET50_BLOCKS = (3, 4, 6, 3)
_MOBILENET_BLOCKS = 13
_KERNELS = ("weights", "kernel", "depthwise_weights")
NORM = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}
TF_ARCHES = ("tf_resnet50", "mobilenet_v1")


@dataclass(frozen=True)
class Network(Weights):
    """Weights of a file together with their masks."""

    masks: dict[str, Tensor] = field(default_factory=dict)


def from_pruned(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Undo torch.nn.utils.prune, which keeps `weight_orig` and `weight_mask` in place of `weight`.

    Returns:
        The weights, each multiplied with its mask, and the masks of all but biases.

    Raises:
        ValueError: A mask is missing or has another shape than its weight.
    """
    weights, masks = dict(state_dict), {}
    for name in [name.removesuffix("_orig") for name in state_dict if name.endswith("_orig")]:
        if f"{name}_mask" not in state_dict:
            raise ValueError(f"it has {name}_orig but no {name}_mask")
        weights[name] = weights.pop(f"{name}_orig")
        masks[name] = weights.pop(f"{name}_mask") != 0
    kernels = {name: mask for name, mask in masks.items() if mask.dim() >= 2}
    return masked(weights, masks), kernels


def to_nvidia(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights under the names of NVIDIA's later versions."""
    return {
        re.sub(r"^layer(\d+)\.", lambda m: f"layers.{int(m[1]) - 1}.", name): tensor
        for name, tensor in state_dict.items()
    }


def port_masks(weights: Mapping[str, Tensor], pruner: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the masks in a checkpoint of the PyTorch port of RigL.

    Args:
        weights: Its weights under our names.
        pruner: Its entry "pruner". `backward_masks` lists a mask, or None for a dense layer, for
            each weight that is neither a bias nor of a normalization layer, in traversal order.

    Raises:
        ValueError: The masks do not fit the weights.
    """
    kernels = [name for name, tensor in weights.items() if tensor.dim() >= 2]
    listed: Sequence[Any] = pruner["backward_masks"]
    if len(listed) != len(kernels):
        raise ValueError(f"{len(listed)} masks do not fit {len(kernels)} convolutions and layers")
    pairs = zip(kernels, listed, strict=True)
    return {name: mask.bool() for name, mask in pairs if mask is not None}


def masked(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with exact zeros where a mask is False.

    Raises:
        ValueError: A mask has another shape than its weight.
    """
    for name, mask in masks.items():
        if weights[name].shape != mask.shape:
            raise ValueError(
                f"the mask of {name} has shape {tuple(mask.shape)}, "
                f"its weight {tuple(weights[name].shape)}"
            )
    zeroed = {name: weights[name].masked_fill(~mask, 0) for name, mask in masks.items()}
    return {**weights, **zeroed}


def from_tf(variables: Mapping[str, Tensor], arch: str) -> Network:
    """Convert a checkpoint of the RigL repository (TensorFlow 1).

    Kernels change from (height, width, in, out) to (out, in, height, width). A mask stands beside
    its kernel, and in the scope that both share. The max-pooling of that graph pads at the end
    (SAME), as that of tf_resnet50 does.

    Args:
        variables: Name -> tensor, such as "resnet_model/initial_conv/weights". Others (momentum,
            step, thresholds) are left alone.
        arch: One of `TF_ARCHES`.

    Raises:
        ValueError: An architecture that the repository does not have or a variable that is missing.
    """
    weights: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    for name, scope in tf_kernels(arch):
        weight_name = f"{name}.weight"
        weights[weight_name] = _from_tf_layout(_find(variables, scope, _KERNELS), name)
        if (mask := _lookup(variables, scope, ("mask",))) is not None:
            masks[weight_name] = _from_tf_layout(mask, name) != 0
    for name, scope in tf_norms(arch):
        for ours, theirs in NORM.items():
            weights[f"{name}.{ours}"] = _find(variables, scope, (theirs,))
        weights[f"{name}.num_batches_tracked"] = torch.tensor(0)
    weights["fc.bias"] = _find(variables, "final_dense", ("biases", "bias"))
    # how the original resized images, which main.py has a flag for
    config = {"interpolation": "tensorflow"}
    return Network(masked(weights, masks), masks=masks, arch=arch, config=config)


def tf_arch(names: Iterable[str]) -> str:
    """Return which of `TF_ARCHES` the variables of these names are of."""
    is_mobilenet = any("/depthwise_nxn_0" in name for name in names)
    return "mobilenet_v1" if is_mobilenet else "tf_resnet50"


def tf_kernels(arch: str) -> Iterator[tuple[str, str]]:
    """Yield (our layer, its scope below "resnet_model") for every kernel.

    Raises:
        ValueError: `arch` is none of `TF_ARCHES`.
    """
    if arch not in TF_ARCHES:
        raise ValueError(f"the RigL repository has {' and '.join(TF_ARCHES)}, not {arch}")
    yield "conv1", "initial_conv"
    if arch == "mobilenet_v1":
        for block in range(_MOBILENET_BLOCKS):
            yield f"blocks.{block}.dw", f"depthwise_nxn_{block}"
            yield f"blocks.{block}.pw", f"contraction_1x1_{block}"
    else:
        for stage, block in _resnet_blocks():
            group = f"block_group{stage}"
            end = f"{group}_{block}_1" if block else f"block_group_projection_{group}"
            if block == 0:
                yield f"layer{stage}.0.downsample.0", f"bottleneck_projection_{end}"
            for conv in (1, 2, 3):
                yield f"layer{stage}.{block}.conv{conv}", f"bottleneck_{conv}_{end}"
    yield "fc", "final_dense"


def tf_norms(arch: str) -> Iterator[tuple[str, str]]:
    """Yield (our BatchNorm, its scope): the graph numbers them in the order of execution."""
    names = ["bn1"]
    for layer, _ in tf_kernels(arch):
        if layer.endswith("downsample.0"):
            names.append(layer.removesuffix("0") + "1")
        elif layer.startswith("layer"):
            names.append(layer.replace("conv", "bn"))
        elif layer.startswith("blocks"):
            names.append(f"{layer}_bn")
    for number, name in enumerate(names):
        yield name, f"batch_normalization_{number}" if number else "batch_normalization"


def _resnet_blocks() -> Iterator[tuple[int, int]]:
    for stage, blocks in enumerate(_RESNET50_BLOCKS, start=1):
        for block in range(blocks):
            yield stage, block


def _lookup(variables: Mapping[str, Tensor], scope: str, names: Sequence[str]) -> Tensor | None:
    # A layer without a mask has its scope twice: initial_conv/initial_conv/weights.
    for prefix in (scope, f"{scope}/{scope}"):
        for name in names:
            if (found := variables.get(f"resnet_model/{prefix}/{name}")) is not None:
                return found
    return None


def _find(variables: Mapping[str, Tensor], scope: str, names: Sequence[str]) -> Tensor:
    found = _lookup(variables, scope, names)
    if found is None:
        raise ValueError(f"there is no variable resnet_model/{scope}/{names[0]}")
    return found


def _from_tf_layout(kernel: Tensor, name: str) -> Tensor:
    if kernel.dim() == 2:
        return kernel.t().contiguous()
    order = (2, 3, 0, 1) if name.endswith(".dw") else (3, 2, 0, 1)
    return kernel.permute(order).contiguous()
