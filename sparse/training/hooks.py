"""Hooks of torch on steps and loads, by which a sparsifier follows any training loop.

Copies lose hooks, closures compute gradients inside of a step, and one step may run hooks several
times. Only this file has to know this.
"""

import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

# torch wraps `step` of every optimizer class in this function, which calls the hooks.
_STEP = Optimizer.profile_hook_step(len).__code__
# Where wrappers keep the optimizer that they wrap.
_INNER = ("optimizer", "base_optimizer", "_base_optimizer")


def unwrap_optimizer(optimizer: Optimizer) -> Optimizer:
    """Take off wrappers: accelerate's, Lightning's, Lookahead, SAM.

    The innermost optimizer takes the steps, whatever its wrappers do before and after them.

    Raises:
        ValueError: There is no torch optimizer inside.
    """
    found: Optimizer | None = None
    inner: Any = optimizer
    while inner is not None and inner is not found:
        if "_optimizer_load_state_dict_post_hooks" in getattr(inner, "__dict__", ()):
            found = inner
        wrapped = (getattr(inner, name) for name in _INNER if hasattr(inner, name))
        inner = next(wrapped, None)
    if found is None:
        raise ValueError(
            f"{type(optimizer).__name__} is no torch.optim.Optimizer with hooks, and wraps none"
        )
    return found


def check_unhooked(optimizer: Optimizer) -> None:
    """Refuse an optimizer that has the hooks of a sparsifier.

    Raises:
        ValueError: The optimizer has hooks of another sparsifier.
    """
    for hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        if isinstance(getattr(hook, "__self__", None), Hooks):
            raise ValueError(
                f"this {type(optimizer).__name__} has a sparsifier already: call its remove() "
                "first, or make model and optimizer anew"
            )


class Hooks:
    """The hooks of one sparsifier, whose methods they call.

    Args:
        optimizer: The optimizer whose steps and loads the hooks follow.
        owners: Names of weights and the modules that own them, all of them for a shared weight.
        steps: Whether to follow steps, too.
        before: Called before an optimizer step, when the gradients are complete.
        after: Called after an optimizer step.
        weight_loaded: Called with the name of a weight after `load_state_dict` of the module that
            owns it. This is a method, and the module does not keep the method's object alive.
        optimizer_loaded: Called after `load_state_dict` of the optimizer.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        owners: Sequence[tuple[str, nn.Module]],
        *,
        steps: bool,
        before: Callable[[], None],
        after: Callable[[], None],
        weight_loaded: Callable[[str], None],
        optimizer_loaded: Callable[[], None],
    ) -> None:
        self.on_steps = steps
        self._optimizer = optimizer
        self._before, self._after, self._optimizer_loaded = before, after, optimizer_loaded
        self._handles = [optimizer.register_load_state_dict_post_hook(self._loaded)]
        for _, module in owners:
            _LoadHook.remove_from(module)
        for name, module in owners:
            hook = _LoadHook(weight_loaded, name)
            handle = module.register_load_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]
            self._handles.append(handle)
        if steps:
            # Dynamo must not trace them: a compiled step runs them between its graphs.
            pre_hook = torch.compiler.disable(self._pre_hook)  # type: ignore[no-untyped-call]
            post_hook = torch.compiler.disable(self._post_hook)  # type: ignore[no-untyped-call]
            self._handles.append(optimizer.register_step_pre_hook(pre_hook))
            self._handles.append(optimizer.register_step_post_hook(post_hook))

    def remove(self) -> None:
        """Unhook everything."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _pre_hook(
        self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._is_nested():
            return args, kwargs
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if closure is None:
            self._before()
            return args, kwargs
        with torch.enable_grad():  # called now, so that gradients exist
            result = closure()
        self._before()
        evaluated = _Evaluated(result, self._optimizer)
        if len(args) > 1:
            return (args[0], evaluated, *args[2:]), kwargs
        return args, {**kwargs, "closure": evaluated}

    def _post_hook(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._is_nested():
            self._after()

    def _loaded(self, _: Optimizer) -> None:
        self._optimizer_loaded()

    def _is_nested(self) -> bool:
        """Say whether this is a step within a step of the same optimizer.

        The `step` of a subclass that calls its parent's runs the hooks twice. Counting the calls on
        the stack needs no memory, which a step that raises would leave wrong.
        """
        depth, frame = 0, sys._getframe()
        while frame.f_back is not None:
            frame = frame.f_back
            if frame.f_code is _STEP and frame.f_locals["args"][0] is self._optimizer:
                depth += 1
        return depth > 1


class _Evaluated:
    """Stands for a closure that was called already, and returns its result once.

    The result is that of a call, if the optimizer changed no weight and no gradient before it.
    """

    def __init__(self, result: Any, optimizer: Optimizer) -> None:
        self._result, self._optimizer, self._calls = result, optimizer, 0
        self._versions = _versions(optimizer)

    def __call__(self) -> Any:
        self._calls += 1
        if self._calls > 1 or _versions(self._optimizer) != self._versions:
            raise ValueError(
                f"{type(self._optimizer).__name__} evaluates its closure more than once in a step, "
                "or at other weights than the step began with, where masks cannot be applied; use "
                "SGD or AdamW"
            )
        return self._result


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _versions(optimizer: Optimizer) -> list[tuple[int, int, int | None]]:
    """Give numbers that change when a weight or a gradient is written or replaced."""
    return [
        (p._version, id(p.grad), None if p.grad is None else p.grad._version)
        for group in optimizer.param_groups
        for p in group["params"]
    ]


class _LoadHook:
    """Follows `load_state_dict` of one module. In a copy of the module it does nothing.

    A copy belongs to another sparsifier, which adds its own hooks, or to none, as the average of a
    model.
    """

    def __init__(self, loaded: Callable[[str], None] | None = None, name: str = "") -> None:
        self._loaded = weakref.WeakMethod(loaded) if loaded else None
        self._name = name

    def __call__(self, module: nn.Module, incompatible_keys: object) -> None:
        loaded = self._loaded() if self._loaded else None
        if loaded is not None:
            loaded(self._name)

    def __reduce__(self) -> tuple[type["_LoadHook"], tuple[()]]:
        return _LoadHook, ()

    @staticmethod
    def remove_from(module: nn.Module) -> None:
        """Remove the hook of an earlier sparsifier, or its remains in a copy."""
        hooks = module._load_state_dict_post_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, _LoadHook)]:
            del hooks[key]
