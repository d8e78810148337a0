"""The module twins of the losses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    Module = nn.Module
else:
    try:
        from torch.nn import Module
    except ImportError:  # NumPy and CuPy users need no torch; only the module twins do
        Module = object


class LossModule(Module):
    """A loss function as a module: its keyword arguments go to the constructor, but for those `_per_call`."""

    _function: Any
    _per_call: tuple[str, ...] = ("weight", "mask", "return_grad")

    def __init__(self, **options: Any) -> None:
        if Module is object:
            raise ImportError("the loss modules need torch: pip install 'noisyseg-fast[torch]'")
        super().__init__()
        allowed = set(self._function.__kwdefaults__ or ()) - set(self._per_call)
        unknown = sorted(set(options) - allowed)
        if unknown:
            raise TypeError(
                f"{type(self).__name__} has no argument {unknown[0]!r}; it takes {sorted(allowed)}"
            )
        self.options = options

    def forward(self, logits: Any, target: Any, weight: Any = None, mask: Any = None) -> Any:
        return self._function(logits, target, weight=weight, mask=mask, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
