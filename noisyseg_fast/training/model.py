"""A trained model as a file: what it takes to build it, and its weights; and inference with it."""

from __future__ import annotations

import dataclasses
import io
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import methods, networks
from .files import written

FORMAT = 1  # of the checkpoint; raised when old ones can no longer be read


@dataclass(frozen=True)
class ModelSpec:
    """Everything that decides a model's shape."""

    method: str
    network: str
    width: int
    spatial_dims: int
    channels: int  # of the image
    classes: int  # background included
    patch: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)  # the method's
    raters: int = 1  # that the method learns from one by one
    spacing: tuple[float, ...] | None = None  # of the images it takes; None: any

    @property
    def outputs(self) -> int:
        """Channels of the logits: one (sigmoid) for two classes, else one for each (softmax)."""
        return 1 if self.classes == 2 else self.classes

    def build(self, training: bool = True) -> methods.Method:
        """The method with fresh networks; training: also those that prediction does without."""

        def network(heads: int = 1) -> torch.nn.Module:
            outputs = heads * self.outputs
            return networks.build(self.network, self.spatial_dims, self.channels, outputs, self.width)

        inputs = methods.Inputs(self.spatial_dims, self.channels, self.raters, self.width)
        return methods.create(self.method, self.options, network, self.outputs, inputs, training)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of this package, tensors on the CPU. ValueError when the file is something else."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as parts:  # torch itself does not look at the sums
            if (part := parts.testzip()) is not None:
                raise ValueError(f"the checksum of {part} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: cannot be read as a checkpoint: {line}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: is no checkpoint of noisyseg-fast (format {FORMAT})")
    return content


class _File(io.FileIO):
    """Keeps the error of a write, of which torch tells nothing but that it failed."""

    failed: OSError | None = None

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        try:
            while len(rest):
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.failed = error
            raise
        return memoryview(data).nbytes


def save(path: Path, content: Any, keep: int = 0) -> None:
    """Content as torch writes it, whole or not at all; keep: as files.written takes it. OSError names `path`."""
    with written(path, keep) as temporary, _File(temporary, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            raise file.failed or error from error


def spec_of(checkpoint: Mapping[str, Any]) -> ModelSpec:
    values = checkpoint["model"]
    spacing = values.get("spacing")  # which older checkpoints have not
    return ModelSpec(**{**values, "patch": tuple(values["patch"]), "spacing": spacing and tuple(spacing)})


def load_model(checkpoint: Mapping[str, Any], device: torch.device) -> tuple[methods.Method, ModelSpec]:
    """The trained method, in evaluation mode on the device."""
    spec = spec_of(checkpoint)
    method = spec.build(training=False)
    # last.pt holds more than that.
    needed, state = method.state_dict(), checkpoint["method"]
    method.load_state_dict({name: value for name, value in state.items() if name in needed})
    return method.eval().to(device), spec


def spec_dict(spec: ModelSpec) -> dict[str, Any]:
    return dataclasses.asdict(spec)


def infer(predictor: Callable[[Tensor], Tensor], image: Tensor, patch: tuple[int, ...]) -> Tensor:
    """Label maps (B, *S) uint8 of images (B, channels, *S): in one piece if they have the patch's size, else
    by windows of that size that overlap by half (MONAI, Gaussian weights)."""
    from monai.inferers import sliding_window_inference

    with torch.no_grad():
        if tuple(image.shape[2:]) == patch:
            logits = predictor(image)
        else:
            logits = sliding_window_inference(image, patch, 4, predictor, overlap=0.5, mode="gaussian")
    if logits.shape[1] == 1:
        return (logits[:, 0] > 0).to(torch.uint8)
    return logits.argmax(1).to(torch.uint8)


def pick_device(name: str) -> torch.device:
    """The device named auto (CUDA if there is any), cpu, cuda or cuda:1; ValueError if it is not there."""
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name} is not there: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs"
        )
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device
