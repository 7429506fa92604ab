"""Data backends by name."""

from __future__ import annotations

from image_classification.data import dali, pytorch, synthetic
from image_classification.data.loader import BackendSpec

BACKENDS: dict[str, BackendSpec] = {
    "dali-gpu": dali.GPU_SPEC,
    "dali-cpu": dali.CPU_SPEC,
    "pytorch": pytorch.SPEC,
    "synthetic": synthetic.SPEC,
    "syntetic": synthetic.SPEC,  # the spelling of NVIDIA's harness
}
"""What `--data-backend` can name."""


def check_backend(name: str, interpolation: str, augmentation: str | None) -> None:
    """Raise ValueError (one line) if a backend does not have an interpolation or augmentation."""
    spec = BACKENDS[name]
    if not spec.reads_images:
        if augmentation is not None:
            raise ValueError(f"--augmentation has no effect on --data-backend {name}")
        return
    if interpolation in spec.refuses:
        raise ValueError(f"--interpolation {interpolation} {spec.refuses[interpolation]}")
    if augmentation is not None and augmentation in spec.refuses:
        raise ValueError(f"--augmentation {augmentation} {spec.refuses[augmentation]}")
