"""The training loop, on Lightning Fabric: device, precision, seeds, validation, checkpoints, resume, logs.

A run's folder holds

    config.json       the settings and the model's, resolved
    split.json        the cases of each part, the meta set and the unlabelled ones among them
    metrics.csv       one row for each epoch
    tensorboard/      the same
    last.pt best.pt   the state where the run stands, and the weights with the best validation Dice
    last-1.pt ...     the states that were last.pt before (`keep`)
    nan-step-N.pt     a step whose loss was not finite, for inspection
    test.csv summary.json report.html      written at the end, of best.pt (or last.pt)

Checkpoint formats and the loop know nothing of any method.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import numpy as np
import torch

from .. import __version__
from . import cache, evaluate, methods, networks, nonfinite, parallel, resample
from .data import Array, Case, Data, Store, TrainingSet, check, open_data, patch_size
from .evaluate import Summary
from .files import clear, older, write_csv, write_json
from .label_errors import Found, explained, find
from .model import FORMAT, ModelSpec, load_model, pick_device, read_checkpoint, save, spec_dict, spec_of
from .signals import Asked, Interrupted, held, in_worker
from .untrusted import first_line, parse_json, parse_settings, typed

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from rich.console import Console
    from rich.progress import Progress

SCHEDULES = ("poly", "constant", "halve", "tenth")
OPTIMIZERS = ("adam", "sgd")
TRAIN_ON = ("training", "meta", "both")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
ON_NAN = ("stop", "skip")
LOOK = 50  # steps from one look at whether the loss is finite to the next: each makes the host wait for the device
IN_A_ROW = 10  # steps that on_nan "skip" leaves out one after another before the run stops all the same
LOG = logging.getLogger(__name__)
COLUMNS = ("epoch", "train_loss", "val_dice", "val_iou", "val_hd95", "val_empty", "lr", "seconds")


@dataclass(frozen=True)
class Config:
    """The settings of a run. ValueError names the one that is wrong."""

    data: str = "sample"  # or a folder, a datalist or an .npz; see data.py
    data_root: str | None = None  # the folder that a datalist's files lie in; None: the datalist's own
    method: str = "ce"
    options: Mapping[str, Any] = field(default_factory=dict)  # the method's, in place of its defaults
    network: str | None = None  # None, both: as the method says, which is unet of width 16 for most
    width: int | None = None
    foreground: float | None = None  # share with which an untrained network begins; None: as MONAI makes it
    epochs: int = 100
    epoch_batches: int | None = None  # steps of an epoch; None: one pass over the training cases
    batch_size: int = 16  # of all processes together
    optimizer: str = "adam"  # or "sgd", with momentum 0.9
    lr: float = 1e-3
    # Of lr: poly, (1 - epoch/epochs)^0.9, nnU-Net's; constant; halve; tenth, to a tenth (UA-MT's every 2500 steps).
    schedule: str = "poly"
    halve_every: int = 10_000  # steps, of schedules "halve" (COPLE-Net sec. III-A) and "tenth"
    weight_decay: float = 0.0
    patience: int | None = None  # stop after so many epochs without a better validation Dice
    noise_rate: float = 0.0  # share of training labels that are dilated
    noise_radius: int = 6  # by 0 to so many pixels (MCPM sec. 4.1)
    validation: float = 0.1  # shares of the patients, where the data do not say
    test: float = 0.2
    meta_fraction: float = (
        0.0  # of the training patients, whose labels are clean; 0: those marked in the data
    )
    test_on: str = "best"  # the weights of the epoch with the best validation Dice, or "last"
    train_on: str = "training"  # the perhaps noisy cases, or "meta": the clean ones, or "both"
    ignore_label: int | None = None  # value in masks of pixels without a label, where the data do not name it
    patch: tuple[int, ...] | None = None
    spacing: tuple[float, ...] | None = None  # resample all images to it; None: leave them as they are
    seed: int = 0
    device: str = "auto"
    precision: str = "32-true"
    workers: int = 0  # processes that prepare batches
    cache: str = "memory"  # where loaded cases are kept: memory, disk or none; see data.Store
    cache_gb: float = 4.0  # of memory at most
    cache_dir: str | None = None  # of "disk"; None: where the platform keeps caches
    devices: int = 1  # processes that train together on each computer; torchrun's number goes first
    nodes: int = 1  # computers
    keep: int = 2  # checkpoints to go on from: last.pt, last-1.pt, which was last.pt before, ...
    save_every: int | None = None  # steps; None: last.pt is written after each epoch only
    # When a loss, or a parameter after a step, is not finite: "stop" before that step, or "skip" it: the run goes on
    # as if it had not been, and stops after IN_A_ROW of them in a row. Either way it is kept in nan-step-N.pt.
    on_nan: str = "stop"
    out: str = "runs/train"

    def check(self) -> None:
        counts = ("epochs", "batch_size", "width", "halve_every", "patience", "keep", "save_every")
        for name in (*counts, "devices", "nodes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("seed", "workers", "noise_radius"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.ignore_label is not None and not isinstance(self.ignore_label, int):
            raise ValueError(f"ignore_label must be a whole number, got {self.ignore_label!r}")
        if self.epoch_batches is not None and self.epoch_batches < 1:
            raise ValueError(f"epoch_batches must be at least 1, got {self.epoch_batches}")
        if not 0 <= self.meta_fraction < 1:
            raise ValueError(f"meta_fraction must be at least 0 and below 1, got {self.meta_fraction}")
        if self.test_on not in ("best", "last"):
            raise ValueError(f"unknown test_on {self.test_on!r}; choose from best, last")
        if self.foreground is not None and not 0 < self.foreground < 1:
            raise ValueError(f"foreground must be between 0 and 1, got {self.foreground}")
        if self.train_on not in TRAIN_ON:
            raise ValueError(f"unknown train_on {self.train_on!r}; choose from {', '.join(TRAIN_ON)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.schedule!r}; choose from {', '.join(SCHEDULES)}")
        if self.on_nan not in ON_NAN:
            raise ValueError(f"unknown on_nan {self.on_nan!r}; choose from {', '.join(ON_NAN)}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {self.optimizer!r}; choose from {', '.join(OPTIMIZERS)}")
        if self.spacing is not None:
            resample.check(self.spacing)
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive and finite, got {self.lr}")
        if not 0 <= self.noise_rate <= 1:
            raise ValueError(f"noise_rate must be between 0 and 1, got {self.noise_rate}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"unknown precision {self.precision!r}; choose from {', '.join(PRECISIONS)}")
        cache.check(self.cache, self.cache_gb)
        methods.configure(self.method, self.options)
        if self.network is not None:
            networks.get(self.network)
        pick_device(self.device)

    def resolved(self) -> Config:
        """With the method's network and width where none are named."""
        network, width = methods.get(self.method).network_default
        if self.network is not None:
            width = 16
        return dataclasses.replace(self, network=self.network or network, width=self.width or width)

    def decay(self, step: int, steps_per_epoch: int) -> float:
        """What lr is multiplied by at that step."""
        if self.schedule in ("halve", "tenth"):
            return float((0.5 if self.schedule == "halve" else 0.1) ** (step // self.halve_every))
        return (1 - step // steps_per_epoch / self.epochs) ** 0.9 if self.schedule == "poly" else 1.0


def read_config(out: Path) -> Config:
    """The settings of the run in that folder."""
    path = out / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {out} holds no run to resume")
    try:
        return dataclasses.replace(config_of(parse_json(path)["config"]), out=str(out))
    except (KeyError, TypeError, ValueError) as error:
        line = first_line(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: is no configuration of this version ({line})") from error


def load_config(path: Path) -> Config:
    """The settings in a YAML or JSON file: those of Config, the missing ones by default, or a run's config.json,
    which repeats that run, with the method's options as they were then."""
    content = parse_settings(path)
    try:
        if "config" in content:
            content = {**content["config"], "options": content["method_options"]}
        return config_of(content)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: is no configuration ({first_line(error)})") from error


def config_of(values: Mapping[str, Any]) -> Config:
    """The settings as config.json and checkpoints keep them; ValueError for unknown ones and other types."""
    return Config(**typed(values, get_type_hints(Config)))


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    config: Config
    out: Path
    history: list[dict[str, float]]  # the rows of metrics.csv
    best_epoch: int
    test: Summary
    unit: str  # of HD95
    pictures: list[dict[str, Any]]  # evaluate.pictures
    found: Found | None = None  # how well the method's weights tell the corrupted labels
    weights: list[dict[str, Any]] = field(default_factory=list)  # label_errors.find
    explained: list[dict[str, Any]] = field(default_factory=list)  # label_errors.explained

    def run(self, name: str) -> dict[str, Any]:
        """As report.write_report takes it."""
        test = {"dice": self.test.dice, "iou": self.test.iou, "hd95": self.test.hd95}
        return {"name": name, "metrics_csv": self.out / "metrics.csv", "test": test}


def train(
    config: Config,
    *,
    resume: bool = False,
    console: Console | None = None,
    picture_ids: Sequence[str] | None = None,
    report: bool = True,
    data: Data | None = None,
) -> Result:
    """Train, keep the weights with the best validation Dice, and test those.

    resume: go on from config.out/last.pt, or the newest one before it that can be read; the parameters come out as
    if the run had never stopped (bit for bit on one CPU with the same threads). console: where progress bars go,
    None for none. picture_ids: the cases whose pictures are kept; by default some test cases and two with corrupted
    labels. report: write report.html. data: what to train on, split already, in place of what config.data names.

    SIGTERM or SIGINT, in the main thread: the step is finished, last.pt written, and Interrupted raised, a
    KeyboardInterrupt; a second signal ends the process at once.

    Raises ValueError (DataError) for bad settings or data before anything is written, FileExistsError when
    config.out holds a run already, FloatingPointError when the loss is not finite, OSError when a file cannot be
    read or written, ChildProcessError when a worker process was killed. Of several processes (parallel.py) all raise
    what one raises; the first alone writes, and has the pictures and what the weights tell.
    """
    config.check()
    config = config.resolved()
    fabric, group = parallel.launch(
        pick_device(config.device), config.devices, config.nodes, config.precision
    )
    with group.alike(), parallel.told(config.out), progress(console if group.first else None) as bars:
        loop = group.together(lambda: _prepare(config, resume, data, fabric, group, bars))
        with loop.asked:
            group.write(loop.describe)
            group.together(loop.found)
            loop.run(bars)
            result = loop.finish(bars, picture_ids)
        if report:
            group.write(lambda: _report(result))
    return result


def _prepare(
    config: Config, resume: bool, data: Data | None, fabric: Fabric, group: parallel.Group, bars: Progress
) -> _Loop:
    """What there is to do before the first step; nothing is written."""
    assert config.network is not None and config.width is not None
    out = Path(config.out)
    if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(
            f"{out} is not empty; choose another folder (--out) or resume the run in it (--resume)"
        )
    data = data or open_run(config)
    check_needs(config, data)
    method = methods.get(config.method)
    parts = method.needs | method.wants
    store = Store(
        data.classes,
        int(config.cache_gb * 1e9),
        raters="raters" in parts,
        spacing=config.spacing,
        cache=config.cache,
        folder=Path(config.cache_dir) if config.cache_dir else None,
    )
    task = bars.add_task("reading", total=len(data.split("all")), note="")
    shape = check(data, store, lambda: bars.advance(task))
    bars.remove_task(task)
    patch = patch_size(shape, networks.get(config.network).divisor, config.patch)
    training = TrainingSet(
        data.training if config.train_on != "meta" else (),
        store,
        patch,
        noise_rate=config.noise_rate,
        noise_radius=config.noise_radius,
        seed=config.seed,
        clean=data.meta if config.train_on != "training" else (),
        meta=data.meta if "meta" in parts else (),
        unlabelled=data.unlabelled if "unlabelled" in parts else (),
        fuse=_fusion(config, data.classes) if "raters" in parts else None,
        items=config.epoch_batches and config.epoch_batches * config.batch_size,
    )
    spec = ModelSpec(
        config.method,
        config.network,
        config.width,
        shape.spatial_dims,
        shape.channels,
        data.classes,
        patch,
        dict(config.options),
        max(1, training.raters),
        config.spacing,
    )
    loop = _Loop(config, spec, data, store, training, fabric, group)
    if resume:
        loop.resume()
    return loop


def _report(result: Result) -> None:
    from .report import write_report

    config = result.config
    name = config.method
    overlays = merge_pictures({name: result.pictures})
    write_report(
        result.out / "report.html",
        title=f"{config.method} on {config.data}, noise rate {config.noise_rate:g}",
        runs=[result.run(name)],
        overlays=overlays,
        weights={name: result.weights} if result.found else {},
        explained=result.explained,
        notes=[
            f"Test: {result.test.sentence(result.unit)}.",
            f"Best epoch: {result.best_epoch}.",
            *([found_sentence(result.found)] if result.found else []),
        ],
    )


def _fusion(config: Config, classes: int) -> Callable[[Array], Array | None]:
    """The method's own way to one label of the raters' masks of a case."""
    method, settings = methods.get(config.method), methods.configure(config.method, config.options)
    return lambda raters: method.fuse(settings, raters, classes)


def found_sentence(found: Found) -> str:
    return (
        f"Weights as detectors of the corrupted labels ({found.share:.1%} of the pixels of {found.cases} training "
        f"cases): AUROC {found.auroc:.3f}, average precision {found.average_precision:.3f}; mean weight "
        f"{found.weight_wrong:.3f} where the label is wrong, {found.weight_right:.3f} where it is right."
    )


def open_run(config: Config, source: str | None = None) -> Data:
    """The data of a run, or other data split alike."""
    return open_data(
        source or config.data,
        validation=config.validation,
        test=config.test,
        seed=config.seed,
        meta_fraction=config.meta_fraction,
        ignore_label=config.ignore_label,
        root=config.data_root,
    )


def check_needs(config: Config, data: Data) -> None:
    """ValueError when the data lack what the method, or train_on, cannot do without."""
    needs = methods.get(config.method).needs
    who = f"method {config.method}" if "meta" in needs else f"train_on {config.train_on!r}"
    if ("meta" in needs or config.train_on != "training") and not data.meta:
        raise ValueError(
            f"{who} needs cases with clean labels, {config.data} marks none; set meta_fraction "
            "(--meta-fraction 0.1) to take that share of the training patients for clean, or mark cases: "
            '"clean": true in a datalist, a column clean in patients.csv'
        )
    if data.ignore is not None and not methods.get(config.method).sparse:
        able = ", ".join(name for name, method in methods.METHODS.items() if method.sparse)
        raise ValueError(
            f"method {config.method} cannot leave out pixels without a label (ignore_label {data.ignore}); "
            f"choose from {able}"
        )
    if "raters" in needs and max(len(case.labels) for case in data.training) < 2:
        raise ValueError(
            f"method {config.method} needs several raters, {config.data} has one; give each rater's mask, "
            "as labelsTr/CASE_rater0.nii.gz, _rater1, ..."
        )
    if "unlabelled" in needs and not data.unlabelled:
        raise ValueError(
            f"method {config.method} needs images without labels, {config.data} has none; put them into the "
            'folder imagesUn, or into the datalist\'s "training" without "label"'
        )


def merge_pictures(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The pictures of several runs of the same cases, as report.write_report takes them."""
    merged: dict[str, dict[str, Any]] = {}
    for name, pictures in runs.items():
        for picture in pictures:
            entry = merged.setdefault(
                picture["id"],
                {k: picture[k] for k in ("id", "image", "clean", "noisy")} | {"predictions": {}},
            )
            if entry["noisy"] is None:
                entry["noisy"] = picture["noisy"]
            entry["predictions"][name] = picture["prediction"]
    return list(merged.values())


class _Loader(torch.utils.data.DataLoader[Any]):
    """Its workers see no signal before they know what to do with one."""

    def __iter__(self) -> Any:
        with held():
            return super().__iter__()


class _Loop:
    """The state of a run and what is done with it."""

    def __init__(
        self,
        config: Config,
        spec: ModelSpec,
        data: Data,
        store: Store,
        training: TrainingSet,
        fabric: Fabric,
        group: parallel.Group,
    ) -> None:
        from lightning.fabric import seed_everything

        self.config, self.spec, self.data, self.store, self.training = config, spec, data, store, training
        self.out = Path(config.out)
        self.fabric, self.group, self.device = fabric, group, fabric.device
        self.refused: list[Path] | None = None  # checkpoints that could not be used, where a run was resumed
        seed_everything(config.seed, verbose=False)
        self.method = spec.build()
        if config.foreground is not None:
            networks.start_at(self.method.network, config.foreground)
        kind: Any = torch.optim.Adam
        if config.optimizer == "sgd":
            kind = partial(torch.optim.SGD, momentum=0.9)
        optimizer = kind(self.method.trained(), lr=config.lr, weight_decay=config.weight_decay)
        self.batches = -(-training.items // config.batch_size)  # of an epoch
        self.method.plan = methods.Plan(optimizer, config.epochs * self.batches, self.batches)
        self.own_lr = {  # of the method's own optimisers, before any decay
            name: [group["lr"] for group in own.param_groups] for name, own in self.method.optimizers.items()
        }
        self.module, self.optimizer = self.fabric.setup(self.method, optimizer)
        self.module.mark_forward_method("training_step")
        self.epoch = 0  # the next to be trained
        self.at = 0  # batches of it that are done
        self.step = 0
        self.total: dict[str, torch.Tensor] = {}  # sums of the losses in this epoch
        self.count: dict[str, int] = {}  # a method need not report every loss in every step
        self.skipped: list[int] = []  # steps that were left out, by on_nan
        self.seconds = 0.0  # that this epoch took before an interruption
        self.began = time.perf_counter()  # this epoch, less `seconds`
        self.asked = Asked()
        self.best = -1.0
        self.best_epoch = -1
        self.history: list[dict[str, float]] = []

    # -- files --

    def split(self) -> dict[str, list[str]]:
        names = ("training", "validation", "test", "meta")
        ids = {name: [c.id for c in self.data.split(name)] for name in names}
        return {**ids, "unlabelled": [c.id for c in self.data.unlabelled]}

    def describe(self) -> None:
        """config.json and split.json, before the first epoch, and what a resumed run finds in order."""
        clear(self.out)
        for bad in self.refused or ():  # which would be kept in place of a good one
            os.replace(bad, bad.with_name(f"refused-{bad.name}"))
        if self.refused is not None:
            write_csv(self.out / "metrics.csv", COLUMNS, self.history)
        content = {
            "config": dataclasses.asdict(self.config),
            "method_options": dataclasses.asdict(self.method.config),
            "model": spec_dict(self.spec),
            "versions": {"noisyseg-fast": __version__, "torch": torch.__version__},
        }
        write_json(self.out / "config.json", content)
        write_json(self.out / "split.json", self.split())

    def found(self) -> None:
        """FileNotFoundError where this process does not see what the first one wrote."""
        if not (self.out / "config.json").is_file():
            raise FileNotFoundError(
                f"{self.out}: is not here what it is for the first process; choose a folder that all computers share"
            )

    def save(self, name: str, weights: Mapping[str, torch.Tensor], keep: int = 0, **more: Any) -> None:
        content = {
            "format": FORMAT,
            "version": __version__,
            "model": spec_dict(self.spec),
            "config": dataclasses.asdict(self.config),
            "method": weights,
            "epoch": self.epoch,
            **more,
        }
        save(self.out / name, content, keep)

    def state(self) -> dict[str, Any]:
        """Where the run stands after a step, the tensors being its own; `load` puts it back."""
        return {
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "optimizers": {name: own.state_dict() for name, own in self.method.optimizers.items()},
            "scaler": self.fabric.strategy.precision.state_dict(),  # of 16-mixed, else empty
            "at": self.at,
            "step": self.step,
            "total": self.total,
            "count": self.count,
            "skipped": self.skipped,
            "random": _random_state(self.device),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """What `state` gave; checkpoints of older versions lack what only a stop within an epoch needs."""
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, own in self.method.optimizers.items():
            own.load_state_dict(state["optimizers"][name])
        if state.get("scaler"):
            self.fabric.strategy.precision.load_state_dict(state["scaler"])
        self.at, self.step, self.skipped = state.get("at", 0), state["step"], list(state.get("skipped", ()))
        self.total = {name: value.to(self.device) for name, value in state.get("total", {}).items()}
        self.count = dict(state.get("count", {}))
        _set_random_state(state["random"], self.device)

    def save_last(self) -> None:
        """last.pt, beside those before it."""
        self.group.write(self.write_last)

    def rescue(self, **changed: Any) -> None:
        """The same on the way out, where no process waits for another."""
        if self.group.first:
            with suppress(OSError):
                self.write_last(**changed)

    def write_last(self, **changed: Any) -> None:
        """changed: parts of the state in place of those there are."""
        state = {**self.state(), **changed}
        self.save(
            "last.pt",
            state.pop("method"),
            self.config.keep - 1,
            seconds=time.perf_counter() - self.began if self.at else 0.0,
            best=self.best,
            best_epoch=self.best_epoch,
            history=self.history,
            **state,
        )

    def resume(self) -> None:
        """Go on from last.pt, or from the newest one before it that can be used; from the start without any.

        ValueError when there are some and none can be used. Writes nothing.
        """
        there = [path for i in range(100) if (path := older(self.out / "last.pt", i)).is_file()]
        if not there:  # stopped in the first epoch
            return
        before = json.loads((self.out / "split.json").read_text(encoding="utf-8"))
        if before != self.split():
            raise ValueError(
                f"{self.config.data}: its cases are no longer those of {self.out / 'split.json'}"
            )
        refused = []
        for path in there:
            try:
                state = read_checkpoint(path)
                if spec_of(state) != self.spec:
                    raise ValueError(f"{path}: was trained with another model than {self.spec}")
                self.load(state)
                self.epoch, self.seconds = state["epoch"], state.get("seconds", 0.0)
                self.best, self.best_epoch, self.history = (
                    state["best"],
                    state["best_epoch"],
                    state["history"],
                )
                break
            except ValueError as error:
                refused.append(str(error))
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
                line = " ".join(str(error).split())[:200]
                refused.append(f"{path}: is no checkpoint of this run ({type(error).__name__}: {line})")
        else:
            raise ValueError("; ".join([*refused, "no checkpoint is left to resume from"]))
        for line in refused:
            LOG.warning("%s; going on from %s", line, path.name)
        if self.epoch > self.config.epochs:
            raise ValueError(f"epochs must be at least {self.epoch}, which are done already")
        self.refused = there[: len(refused)]

    # -- training --

    def run(self, bars: Progress) -> None:
        from torch.utils.tensorboard import SummaryWriter

        task = bars.add_task(self.config.method, total=self.config.epochs * self.batches, note="")
        bars.update(task, completed=self.step)
        log: Any = None
        if self.group.first:
            log = SummaryWriter(str(self.out / "tensorboard"), purge_step=self.epoch)
        try:
            while self.epoch < self.config.epochs and not self.stalled():
                self._epoch(bars, task, log)
        except RuntimeError as error:  # a worker's end is told by a signal, within a step as well
            if (told := _told(error, self.out)) is error:
                raise
            raise told from error
        finally:
            if log is not None:
                log.close()
        bars.remove_task(task)

    def stalled(self) -> bool:
        """Whether validation has not gained for `patience` epochs."""
        patience = self.config.patience
        return (
            patience is not None and self.mature(self.epoch) and self.epoch - 1 - self.best_epoch >= patience
        )

    def mature(self, epochs: int) -> bool:
        return self.method.mature(epochs * self.batches)

    def stopping(self) -> bool:
        """Whether to stop now, on all processes alike: asked after each step."""
        return self.group.flagged if self.group.size > 1 else self.asked.number is not None

    def anywhere(self, flag: bool) -> bool:
        """The flag, or that of any other process."""
        return self.group.any(flag)[0]

    def interrupted(self) -> Interrupted:
        return Interrupted(self.asked.number or signal.SIGTERM)

    def _steps(self, advance: Callable[[], None]) -> None:
        """The steps that are left of the epoch.

        Whether all is finite is looked at only every LOOK steps, and before anything is saved. Where it is not, the
        steps since the last look are done again, one look each, so that the first one at fault is found.
        """
        good, again = _copied(self.state()), -1  # the steps up to number `again` are done again
        batches = self._batches(self.epoch, self.at)
        while self.at < self.batches:
            try:
                batch = next(batches)
            except Exception:  # as for a file that is gone; the state is whole
                self.rescue()
                raise
            losses = self._step(batch)
            number, last = self.step, self.at == self.batches
            stop = self.stopping()
            save = self.config.save_every and number % self.config.save_every == 0 and not last
            if stop or save or last or number <= again or self.at % LOOK == 0:
                if self.anywhere(not nonfinite.finite(self.total["loss"], list(self.method.parameters()))):
                    self.load(_copied(good))
                    if self.step + 1 < number:
                        again, batches = number, self._batches(self.epoch, self.at)
                        continue
                    line = self._fault(batch, losses)
                    self.load(_copied(good))
                    self._leave_out(line)
                good = _copied(self.state())
            if number >= again:
                advance()
            if stop:
                self.save_last()
                raise self.interrupted()
            if save:
                self.save_last()

    def _step(self, batch: methods.Batch) -> methods.Losses:
        self._set_lr()
        with self.group.dividing(self.method):
            losses: methods.Losses = self.module.training_step(batch, self.step)
            self.optimizer.zero_grad()
            self.fabric.backward(losses["loss"])
            self.optimizer.step()
            self.method.after_step(self.step)
        for name, value in losses.items():
            self.total[name] = self.total.get(name, 0) + value.detach()
            self.count[name] = self.count.get(name, 0) + 1
        self.step += 1
        self.at += 1
        return losses

    def _fault(self, batch: methods.Batch, losses: methods.Losses) -> str:
        """What was not finite in this step, before which the run stands, also as a file. Changes the state."""
        numbers = {name: float(value.detach()) for name, value in losses.items()}
        good = nonfinite.parameters_finite(self.method)
        first = self.at * self.config.batch_size
        order = self.training.order(self.epoch)[first : first + self.config.batch_size]
        cases = [self.training.case_ids(number) for number in order]
        images = nonfinite.diagnose(self.module, batch, self.step, cases)
        path = self.out / f"nan-step-{self.step}.pt"
        self.group.write(lambda: nonfinite.write(path, batch, self.step, self.epoch, numbers, images))
        what = nonfinite.sentence(images, numbers, good)
        return f"step {self.step} (epoch {self.epoch}): {what}; saved in {path}"

    def _leave_out(self, line: str) -> None:
        """Go on behind a step at fault as if it had not been, or stop before it."""
        row = [*self.skipped, self.step][-IN_A_ROW:]
        if self.config.on_nan == "stop":
            line += "; try a smaller lr, or --on-nan skip"
        elif row == list(range(self.step - IN_A_ROW + 1, self.step + 1)):
            line += f"; it is the last of {IN_A_ROW} in a row"
        else:
            LOG.warning("%s; left out", line)
            self.skipped.append(self.step)
            self.step, self.at = self.step + 1, self.at + 1
            return
        self.save_last()

        def stop() -> None:
            raise FloatingPointError(line)

        self.group.together(stop)

    def _epoch(self, bars: Progress, task: Any, log: Any) -> None:
        epoch, config = self.epoch, self.config
        self.began, self.seconds = time.perf_counter() - self.seconds, 0.0
        self.module.train()
        self._steps(lambda: bars.advance(task))
        rate = config.lr * config.decay(self.step - 1, self.batches)
        means = {name: float(value) / self.count[name] for name, value in self.total.items()}
        means.setdefault("loss", math.nan)  # where every step was left out
        self.group.compare(self.method.state_dict(), f"epoch {epoch}")
        self.module.eval()
        random = _random_state(self.device)
        try:
            val = evaluate.summarize(self._scores(self.data.validation))
        except (Exception, Interrupted):  # the resumed run validates from the start
            self.rescue(random=random)
            raise
        row = {
            "epoch": epoch,
            "train_loss": means["loss"],
            "val_dice": val.dice,
            "val_iou": val.iou,
            "val_hd95": val.hd95,
            "val_empty": val.empty_predictions,
            "lr": rate,
            "seconds": time.perf_counter() - self.began,
        }
        self.history.append(row)
        self.epoch, self.at, self.total, self.count = self.epoch + 1, 0, {}, {}
        # The first epoch of a method that is mature replaces the best of those before.
        better = self.best_epoch < 0 or self.mature(self.epoch) > self.mature(self.best_epoch + 1)
        better = better or (val.dice > self.best and self.mature(self.epoch))
        if better:
            self.best, self.best_epoch = val.dice if math.isfinite(val.dice) else -1.0, epoch
            self.group.write(lambda: self.save("best.pt", self.method.exported()))
        # The history travels in last.pt, so metrics.csv can always be made whole after a crash.
        self.save_last()

        def write() -> None:
            write_csv(self.out / "metrics.csv", COLUMNS, self.history)
            for name, number in (
                ("val/dice", val.dice),
                ("val/iou", val.iou),
                ("val/hd95", val.hd95),
                ("lr", rate),
            ):
                log.add_scalar(name, number, epoch)
            for name, number in means.items():
                log.add_scalar(f"train/{name}", number, epoch)

        self.group.write(write)
        note = f"epoch {self.epoch}/{config.epochs}  loss {means['loss']:.4f}  val Dice {val.dice:.4f}"
        bars.update(task, note=note)

    def _set_lr(self) -> float:
        decay = self.config.decay(self.step, self.batches)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * decay
        for name, own in self.method.optimizers.items():
            for group, first in zip(own.param_groups, self.own_lr[name], strict=True):
                group["lr"] = first * decay
        return self.config.lr * decay

    def _batches(self, epoch: int, done: int = 0) -> Iterator[methods.Batch]:
        """The batches of an epoch, without those that are done."""
        self.training.epoch = epoch
        order, size = self.training.order(epoch), self.config.batch_size
        batches = [order[start : start + size] for start in range(done * size, len(order), size)]
        loader: Any = _Loader(
            self.training,
            batch_sampler=self.group.shares(batches),
            num_workers=self.config.workers,
            worker_init_fn=in_worker,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator().manual_seed(self.config.seed + epoch),
        )
        moved: Any = self.fabric.setup_dataloaders(loader, use_distributed_sampler=False)

        def loaded() -> Iterator[methods.Batch]:
            try:
                yield from moved
            except Exception as error:
                if (told := _told(error, self.out)) is error:
                    raise
                raise told from error

        sizes = [len(batch) for batch in batches]
        yield from self.group.batches(loaded(), sizes, lambda: self.asked.number is not None)

    def _scores(self, cases: Sequence[Case]) -> list[evaluate.Score]:
        return self._scores_of(self.module, cases)

    def _scores_of(
        self, predictor: Any, cases: Sequence[Case], seen: Callable[[], None] = lambda: None
    ) -> list[evaluate.Score]:
        """Of all cases, in their order; of several processes each predicts its part of them."""
        group, labels = self.group, self.data.classes - 1  # scores of a case
        mine = cases[group.rank :: group.size]

        def stop() -> None:
            seen()
            self._unless_stopping()

        def scores() -> list[evaluate.Score]:
            place = (self.store, self.spec.patch, self.device, self.config.batch_size, stop)
            return evaluate.evaluate(predictor, mine, *place)

        every = group.every(scores)
        places = (divmod(i, group.size) for i in range(len(cases)))
        return [s for k, rank in places for s in every[rank][k * labels : (k + 1) * labels]]

    def _unless_stopping(self) -> None:
        if self.asked.number is not None:
            raise self.interrupted()

    # -- the end --

    def finish(self, bars: Progress, picture_ids: Sequence[str] | None) -> Result:
        path = self.out / f"{self.config.test_on}.pt"
        method, _ = self.group.together(lambda: load_model(read_checkpoint(path), self.device))
        data = self.data
        task = bars.add_task("testing", total=len(data.test), note="")
        scores = self._scores_of(method, data.test, lambda: bars.advance(task, self.group.size))
        summary = evaluate.summarize(scores)
        plain = Result(self.config, self.out, self.history, self.best_epoch, summary, data.unit, [])
        return self.group.write(lambda: self._conclude(plain, method, scores, picture_ids)) or plain

    def _conclude(
        self,
        result: Result,
        method: methods.Method,
        scores: Sequence[evaluate.Score],
        picture_ids: Sequence[str] | None,
    ) -> Result:
        """Writes what came out, and adds what the report shows beyond the scores."""
        data, patch = self.data, self.spec.patch
        evaluate.write_scores(self.out / "test.csv", scores)
        # The weights as they were last, with the state that made them, whichever epoch is tested.
        self.method.eval()
        corrupted = [self.training.cases[i].id for i in np.flatnonzero(self.training.radii >= 3)]
        looked = find(self.method, self.training, self.device, self.config.batch_size, corrupted[:4])
        found, maps = looked or (None, [])
        told = explained(self.method, self.training, self.device, self.config.batch_size)
        content = {
            "best_epoch": self.best_epoch,
            "unit": data.unit,
            "test": result.test._asdict(),
            "weights": found and found._asdict(),
            "skipped_steps": self.skipped,
        }
        write_json(self.out / "summary.json", content)
        index = {case.id: i for i, case in enumerate(self.training.cases)}

        def noisy(case: Case) -> Array | None:
            i = index.get(case.id)
            return self.training.label(i) if i is not None and self.training.radii[i] else None

        ids = picture_ids
        if ids is None:
            corrupted = [self.training.cases[i].id for i in np.flatnonzero(self.training.radii)]
            ids = [*spread(data.test, 4), *corrupted[:2]]
        shown = evaluate.pictures(method, data, self.store, patch, self.device, ids, noisy)
        return dataclasses.replace(result, pictures=shown, found=found, weights=maps, explained=told)


def spread(cases: Sequence[Case], count: int) -> list[str]:
    """The ids of `count` cases, evenly spread."""
    chosen = np.unique(np.linspace(0, len(cases) - 1, min(count, len(cases))).astype(int))
    return [cases[i].id for i in chosen]


def progress(console: Console | None) -> Progress:
    """Progress bars on the console; none without one."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, console=console, disable=console is None, transient=True)


def _told(error: Exception, out: Path) -> Exception:
    """What happened in a worker process, in one line."""
    text = str(error)
    if "DataLoader worker" in text and isinstance(error, RuntimeError) and not text.startswith("Caught "):
        return ChildProcessError(
            f"a process that prepares batches was killed ({' '.join(text.split())}); noisyseg train --resume {out} "
            "goes on from the last checkpoint, with fewer --workers if memory ran out"
        )
    if text.startswith("Caught "):
        kind, _, line = text.rstrip().rpartition("\n")[2].partition(": ")
        return type(error)(line or kind)
    return error


def _copied(part: Any) -> Any:
    """A state that later steps leave as it is."""
    if isinstance(part, torch.Tensor):
        return part.clone()
    if isinstance(part, dict):
        return {name: _copied(value) for name, value in part.items()}
    return [_copied(value) for value in part] if isinstance(part, list) else part


def _random_state(device: torch.device) -> dict[str, Any]:
    """The global generators, as tensors and plain values, so that torch can load them with weights_only."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        # Of the device alone that it runs on: several processes draw alike, each on its own.
        "cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" else [],
    }


def _set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"]:
        torch.cuda.set_rng_state(state["cuda"][0], device)
