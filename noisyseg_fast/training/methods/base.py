"""What every method is made of, and the register of methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, TypedDict

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

Array = np.ndarray[Any, Any]


class _Batch(TypedDict):
    image: Tensor  # (B, channels, *S) float32, z-scored
    label: Tensor  # (B, *S) uint8 class index, perhaps corrupted; 255 for none, if the method is `sparse`
    index: Tensor  # (B,) int64, the case's place in the training set


class Batch(_Batch, total=False):
    """What a step gets; the parts below for methods that ask for them by `needs`."""

    meta: _Batch  # as many cases whose labels may be trusted; index: their places in the meta set
    raters: Tensor  # (B, M, *S) uint8, what each rater drew; 255 all over where one did not, or as in label
    unlabelled: Tensor  # (B, channels, *S) float32, images without labels


Losses = dict[str, Tensor]  # scalars; "loss" is minimised, the others are only logged
MakeNetwork = Callable[..., nn.Module]  # (heads: int = 1), so many times the outputs; see networks.TwoHeads


class Inputs(NamedTuple):
    """What a method may want to know to build networks of its own."""

    spatial_dims: int
    channels: int  # of the image
    raters: int  # M of Batch["raters"]; 1 where the method does not ask for them
    width: int  # of the user's network


class Seen(NamedTuple):
    """What a method makes of the labels of one image, for the report."""

    facts: dict[str, float | str]
    maps: dict[str, Tensor]  # rows of pictures, each (n, *S) between 0 and 1


class Plan(NamedTuple):
    """What a method may want to know of the run it is part of."""

    optimizer: Optimizer  # the engine's, which minimises "loss" over `Method.trained()`
    steps: int  # optimiser steps of the whole run
    steps_per_epoch: int


class Method(nn.Module):
    """Base of all methods; this one trains a single network.

    What must outlive an interruption is a parameter, a buffer, or the state of one of `optimizers`.
    """

    name: ClassVar[str]
    Config: ClassVar[type]
    needs: ClassVar[frozenset[str]] = frozenset()  # parts of Batch beyond the first three
    wants: ClassVar[frozenset[str]] = frozenset()  # the same, used where the data have them
    sparse: ClassVar[bool] = False  # whether labels may be 255 in places, which then count in no loss
    network_default: ClassVar[tuple[str, int]] = ("unet", 16)  # name and width, where the user names none
    plan: Plan  # set by the engine before the first step

    def __init__(self, config: Any, make_network: MakeNetwork, channels: int) -> None:
        """make_network builds the user's network; channels: its outputs, 1 (sigmoid) for two classes."""
        super().__init__()
        self.config = config
        self.channels = channels
        self.activation = "sigmoid" if channels == 1 else "softmax"
        self.network = make_network()
        self.optimizers: dict[
            str, Optimizer
        ] = {}  # of what the method itself steps; lr falls as the engine's

    def prepare(self, inputs: Inputs, make_network: MakeNetwork, training: bool) -> None:
        """Called once after the constructor, before any weights are loaded: the place for networks that depend
        on the data, and for those that only training needs."""

    @classmethod
    def fuse(cls, config: Any, raters: Array, classes: int) -> Array | None:
        """The label (*S) uint8 of a whole case to train on, made once of what each rater drew; None for the
        consensus. raters: (M, *S) uint8, 255 all over where one did not draw. Needs "raters"."""
        return None

    def exported(self) -> dict[str, Tensor]:
        """The part of state_dict that prediction needs, which best.pt keeps: what there is without training."""
        return self.state_dict()

    def trained(self) -> Iterator[nn.Parameter]:
        """The parameters that the engine's optimiser trains: those that want gradients and are in none of
        `optimizers`."""
        own = {
            id(p)
            for optimizer in self.optimizers.values()
            for group in optimizer.param_groups
            for p in group["params"]
        }
        return (p for p in self.parameters() if p.requires_grad and id(p) not in own)

    def training_step(self, batch: Batch, step: int) -> Losses:
        """The losses of one batch; step counts optimiser steps from 0."""
        raise NotImplementedError

    def after_step(self, step: int) -> None:
        """Called after the optimiser's step, as for the moving average of a teacher."""

    def mature(self, step: int) -> bool:
        """Whether what `forward` gives after so many steps may be kept as the best; before that, validation is
        only shown."""
        return True

    def pixel_weights(self, batch: Batch) -> Tensor | None:
        """For the report: the weights (B, *S) that training would now give the labels of this batch, between
        0 and 1 for the most trusted one; None if the method weighs nothing."""
        return None

    def explain(self, batch: Batch) -> list[Seen] | None:
        """For the report: what training now makes of the labels of each image of this batch; None for nothing."""
        return None

    def forward(self, image: Tensor) -> Tensor:
        """The logits (B, channels, *S) that are validated, tested and used for prediction."""
        logits: Tensor = self.network(image)
        return logits


METHODS: dict[str, type[Method]] = {}


def register(name: str) -> Callable[[type[Method]], type[Method]]:
    """Class decorator: makes a method known under `name`."""

    def add(method: type[Method]) -> type[Method]:
        method.name = name
        METHODS[name] = method
        return method

    return add


def get(name: str) -> type[Method]:
    """The method of that name; ValueError lists those there are."""
    try:
        return METHODS[name]
    except KeyError:
        raise ValueError(f"unknown method {name!r}; choose from {', '.join(METHODS)}") from None


def configure(name: str, options: Mapping[str, Any] | None = None) -> Any:
    """The method's configuration with `options` (values or their text) in place of defaults.

    Raises ValueError for an unknown option or a value of another type than the default's.
    """
    config = get(name).Config()
    fields = {f.name: type(getattr(config, f.name)) for f in dataclasses.fields(config)}
    values: dict[str, Any] = {}
    for key, value in (options or {}).items():
        if key not in fields:
            known = ", ".join(fields) or "none"
            raise ValueError(f"method {name} has no option {key!r}; it has: {known}")
        values[key] = _as(fields[key], value, f"option {key} of method {name}")
    return dataclasses.replace(config, **values)


def _as(kind: type, value: Any, what: str) -> Any:
    if kind is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        if kind is bool and not isinstance(value, bool):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError):
        raise ValueError(f"{what} must be of type {kind.__name__}, got {value!r}") from None


def create(
    name: str,
    options: Mapping[str, Any] | None,
    make_network: MakeNetwork,
    channels: int,
    inputs: Inputs | None = None,
    training: bool = True,
) -> Method:
    """A fresh method with its networks; training: also those that prediction does without.

    inputs may be left out for methods that need no raters.
    """
    method = get(name)(configure(name, options), make_network, channels)
    if inputs is None:
        if "raters" in method.needs:
            raise ValueError(f"method {name} needs inputs, to know how many raters there are")
        return method
    method.prepare(inputs, make_network, training)
    return method
