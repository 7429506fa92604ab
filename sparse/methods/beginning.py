"""Make methods whose runs begin with masks, those of another run or of a file."""

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from ..topology.flat import count_nonzero
from .allocation import check_named
from .base import Allocated
from .settings import settings_of

_Method = TypeVar("_Method", bound=Allocated)
_SHARES = ("distribution", "power_scale", "dense_layers", "sparsity_map")


def begin_with(
    method: type[_Method], num_active: Mapping[str, int], settings: Mapping[str, Any]
) -> _Method:
    """Make a method whose run begins with masks.

    Methods that prune go on from them, to the sparsity of the settings. For others the masks say
    how many weights the layers have, and the settings may leave the sparsity out. If it is there,
    it has to give these numbers.

    Args:
        method: Its class.
        num_active: Layer name -> active weights of the layers that have a mask.
        settings: Settings of the method by name.

    Raises:
        ValueError: The method takes no masks, or a setting has no effect.
    """
    if method.from_masks is None:
        raise ValueError(f"{method.name} takes no masks: it {method.why_no_masks}")
    known = settings_of(method)

    def is_given(name: str) -> bool:
        return name in known and settings.get(name, known[name].default) != known[name].default

    for name in filter(is_given, method.masks_replace):
        raise ValueError(
            f"{name} has no effect in a run that begins with masks, which take its place: leave it "
            "out"
        )
    if method.from_masks == "prune":
        return method(**settings, begins_with=num_active)
    if "sparsity" in settings:
        return method(**settings)
    for name in filter(is_given, _SHARES):
        raise ValueError(
            f"{name} has no effect without sparsity, because the masks say how many weights a "
            "layer has: leave it out"
        )
    return method(**settings, sparsity=0.0, begins_with=num_active)  # `fitted_to` replaces it


def check_agreement(method: Allocated, model: nn.Module, num_active: Mapping[str, int]) -> None:
    """Refuse a method that would begin with other numbers of active weights than the masks have.

    Args:
        method: What `begin_with` made.
        model: The model.
        num_active: Layer name -> active weights of the layers that have a mask.

    Raises:
        ValueError: Names the layer and both numbers.
    """
    method = method.fitted_to(model)
    check_named(num_active, method.num_active)
    for name, planned in method.num_in_masks.items():
        count = num_active.get(name, method.allocation.sizes[name])
        if count != planned:
            raise ValueError(
                f"the mask of {name} has {count} active weights, a sparsity of {method.sparsity} "
                f"would give it {planned}: leave the sparsity out, and the masks decide"
            )


def sparse_only(masks: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return the masks that are not all True, and the number of active weights in each."""
    counts = dict(zip(masks, count_nonzero(masks).tolist() if masks else (), strict=True))
    left = {name: mask for name, mask in masks.items() if counts[name] < mask.numel()}
    return left, {name: counts[name] for name in left}
