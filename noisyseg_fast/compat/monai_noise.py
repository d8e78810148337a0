"""Label noise as MONAI dictionary transforms.

    Compose([LoadImaged(("image", "label")), EnsureChannelFirstd(("image", "label")),
             RandErodeOrDilated("label", prob=0.5, radius=(1, 4))])

Labels are (C, *S): one-hot masks, or a label map (1, *S) of which each class is changed after the other. All channels
and all keys get the same noise. What is drawn follows set_random_state, as in MONAI. A label keeps its dtype and, as
a MetaTensor, its metadata; one of floats must hold whole numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from monai.transforms.transform import MapTransform, RandomizableTransform
from monai.utils.type_conversion import convert_to_dst_type

from .. import noise as operations
from ..noise import Noise

_ANY_LABELS = ("shift", "elastic_deform")


class RandLabelNoised(RandomizableTransform, MapTransform):  # type: ignore[misc]
    """With probability `prob` the labels after a noise.

    Args:
        keys: of the labels.
        noise: an operator's name with its `options`, a noise.Noise, a noise.Calibration, or a function
            noise(masks, seed=..., spatial_dims=...); one that adds an axis of raters, (C, K, *S), gives (C * K, *S).
        prob: probability of a change.
        allow_missing_keys: skip keys that are not in the dictionary.
    """

    _labels_apart = True  # a noise of masks is applied to the classes of a label map one by one

    def __init__(
        self,
        keys: Hashable | Sequence[Hashable],
        noise: str | Callable[..., Any],
        prob: float = 1.0,
        allow_missing_keys: bool = False,
        **options: Any,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        if not isinstance(noise, str) and options:
            raise ValueError(f"options {', '.join(options)} need the name of an operator as noise")
        self.noise: Callable[..., Any] = Noise(noise, **options) if isinstance(noise, str) else noise
        self._seed = 0

    def randomize(self, data: Any = None) -> None:
        super().randomize(data)
        self._seed = int(self.R.randint(0, 2**31 - 1))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        self.randomize()
        if not self._do_transform:
            return result
        for key in self.key_iterator(result):
            result[key] = self._noisy(result[key])
        return result

    def _noisy(self, label: Any) -> Any:
        given = label.as_tensor() if hasattr(label, "as_tensor") else torch.as_tensor(label)
        values = given.long() if given.is_floating_point() else given
        if given.is_floating_point() and not bool((values == given).all()):
            raise ValueError("a label of floats must hold whole numbers")
        seeds, dims = [self._seed] * len(values), values.ndim - 1
        apart = self._labels_apart and getattr(self.noise, "name", "") not in _ANY_LABELS
        if apart and int(values.max()) > 1:
            noisy = operations.each_label(self.noise, values, seed=seeds, spatial_dims=dims)
        else:
            noisy = self.noise(values, seed=seeds, spatial_dims=dims)
        noisy = noisy.reshape((-1, *values.shape[1:]))
        return convert_to_dst_type(noisy, label)[0]


def _named(name: str, operator: str) -> type[RandLabelNoised]:
    class Transform(RandLabelNoised):
        def __init__(
            self,
            keys: Hashable | Sequence[Hashable],
            prob: float = 1.0,
            allow_missing_keys: bool = False,
            **options: Any,
        ) -> None:
            super().__init__(keys, operator, prob, allow_missing_keys, **options)

    known = ", ".join(operations.options_of(operator))
    Transform.__name__ = Transform.__qualname__ = name
    Transform.__doc__ = f"noise.{operator} of the labels with probability `prob`. Options: {known}."
    return Transform


RandDilated = _named("RandDilated", "dilate")
RandEroded = _named("RandEroded", "erode")
RandErodeOrDilated = _named("RandErodeOrDilated", "erode_or_dilate")
RandElasticDeformd = _named("RandElasticDeformd", "elastic_deform")
RandShiftd = _named("RandShiftd", "shift")
RandFlipSquared = _named("RandFlipSquared", "flip_square")
RandPolygonized = _named("RandPolygonized", "polygonize")
RandEraseComponentd = _named("RandEraseComponentd", "erase_component")
RandDistortBoundaryd = _named("RandDistortBoundaryd", "distort_boundary")


class RandNoiseMixtured(RandLabelNoised):
    """noise.mixture: one of `noises`, drawn with `probabilities` (default: equal)."""

    def __init__(
        self,
        keys: Hashable | Sequence[Hashable],
        noises: Sequence[Callable[..., Any] | None],
        probabilities: Sequence[float] | None = None,
        prob: float = 1.0,
        allow_missing_keys: bool = False,
    ) -> None:
        draw = partial(operations.mixture, noises=noises, probabilities=probabilities)
        super().__init__(keys, draw, prob, allow_missing_keys)


class RandRaterBiasd(RandLabelNoised):
    """noise.rater_bias: a mask (1, *S) becomes the (K, *S) of K raters with habits."""

    _labels_apart = False

    def __init__(
        self,
        keys: Hashable | Sequence[Hashable],
        bias: Sequence[float],
        spread: float = 0.0,
        prob: float = 1.0,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(
            keys, partial(operations.rater_bias, bias=bias, spread=spread), prob, allow_missing_keys
        )
