"""A trained model as a file: what it takes to build it, and its weights; and inference with it."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor

from . import methods, networks
from .files import written
from .untrusted import first_line, load_tensors, short, typed

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
    content = load_tensors(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: is no checkpoint of noisyseg-fast (format {FORMAT})")
    state, model = content.get("method"), content.get("model")
    try:
        if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
            raise ValueError("it has no weights")
        if not isinstance(model, dict) or not isinstance(content.get("config", {}), dict):
            raise ValueError("it does not say what model it is of")
        content["model"] = typed(model, get_type_hints(ModelSpec), "part of the model")
        _check_spec(spec_of(content), state)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a checkpoint: {first_line(error)}") from error
    return {**content, "file": str(path)}


def _check_spec(spec: ModelSpec, state: Mapping[str, Tensor]) -> None:
    """ValueError unless the model that `spec` describes has these weights; it is built without memory for any."""
    sizes = {"width": spec.width, "channels": spec.channels, "raters": spec.raters}
    if spec.spatial_dims not in (2, 3) or not 2 <= spec.classes <= 255 or min(sizes.values()) < 1:
        raise ValueError("its model has impossible sizes")
    if len(spec.patch) != spec.spatial_dims or not all(0 < n <= 1 << 16 for n in spec.patch):
        raise ValueError(f"its patch is {short(spec.patch)}")
    if spec.spacing is not None and len(spec.spacing) != spec.spatial_dims:
        raise ValueError(f"its spacing is {short(spec.spacing)}")
    # Every size of the model is the length of some axis of its weights.
    longest = max((n for tensor in state.values() for n in tensor.shape), default=0)
    for name, value in sizes.items():
        if name != "raters" and value > longest:
            raise ValueError(f"its weights are not those of a model with {name} {value}")


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
    where = f"{checkpoint['file']}: cannot be read as a checkpoint: " if "file" in checkpoint else ""
    needed, state = method.state_dict(), checkpoint["method"]
    try:
        method.load_state_dict({name: value for name, value in state.items() if name in needed})
    except RuntimeError as error:
        other = (n for n, value in needed.items() if n not in state or state[n].shape != value.shape)
        name = next(other, "one")
        raise ValueError(
            f"{where}its weights are not those of its model: {name} is missing or another"
        ) from error
    for name, value in method.named_parameters():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{where}its weights {name} are not finite")
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
