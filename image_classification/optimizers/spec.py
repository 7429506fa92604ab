"""What the trainer knows of an optimizer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch.optim import Optimizer


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec:
    """An optimizer that `--optimizer` can name."""

    create: Callable[..., Optimizer]
    """Called with the parameter groups, and by keyword with lr, weight_decay, device and
    `settings`."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """The flags that have an effect on it, besides the learning rate and the weight decay, and what
    the help calls them."""
    description: str = ""
    """What the help says of it, where the name does not say enough."""
    shards: bool = True
    """Whether it takes the sharded weights of --fsdp."""
    equivalent: str | None = None
    """An optimizer with the same state that can be created on any device."""
