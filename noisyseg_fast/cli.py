"""The command `noisyseg`.

Heavy imports (torch, MONAI, Lightning) wait until a command needs them, so that --help answers at once.
Bad input ends with one line on stderr and exit code 2; --debug, anywhere on the line, adds the traceback.
"""

from __future__ import annotations

import os
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Annotated, Any

INSTALL = "install the training extras: pip install 'noisyseg-fast[train]', or '.[train]' from a checkout"

try:
    import typer
    from rich.console import Console
    from rich.table import Table
    from typer.core import TyperGroup
except ModuleNotFoundError as missing:
    print(f"noisyseg: {missing.name} is not installed; {INSTALL}", file=sys.stderr)
    raise SystemExit(2) from None

out = Console()


class _Group(TyperGroup):
    """Takes --debug from anywhere on the line, and turns errors into one line and an exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta["debug"] = "--debug" in args
        return super().parse_args(ctx, [a for a in args if a != "--debug"])

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, TypeError, OSError, FloatingPointError) as error:
            return self._fail(ctx, error, str(error) or type(error).__name__, 2)
        except ModuleNotFoundError as error:
            return self._fail(ctx, error, f"{error.name} is not installed; {INSTALL}", 2)
        except KeyboardInterrupt as stop:
            print("noisyseg: interrupted", file=sys.stderr)
            raise typer.Exit(getattr(stop, "code", 130)) from None
        except Exception as error:
            if isinstance(error, typer.Abort) or hasattr(error, "exit_code"):  # Typer's own ways of ending
                raise
            return self._fail(ctx, error, f"{type(error).__name__}: {error} (--debug shows where)", 1)

    def _fail(self, ctx: Any, error: Exception, text: str, code: int) -> None:
        if ctx.meta["debug"]:
            traceback.print_exception(error)
        if not _another_says(error):
            print(f"noisyseg: {' '.join(text.split())}", file=sys.stderr)
        raise typer.Exit(code) from error


def _another_says(error: BaseException) -> bool:
    """Whether this is one of several processes that train together, and the first says what is wrong."""
    if not {"RANK", "LOCAL_RANK"} & os.environ.keys():
        return False
    from .training import parallel

    return parallel.silent(error)


app = typer.Typer(
    name="noisyseg",
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Segmentation with noisy, scarce or disagreeing masks.",
)

Option = typer.Option
Debug = Annotated[bool, Option("--debug", help="Show the traceback of an error.")]
SOURCE = "'sample', a folder (imagesTr and labelsTr, or CASE_image and CASE_label), a datalist .json or arrays .npz."
METAVAR = "sample|DIR|JSON|NPZ"
IGNORE = Option(
    help="The value in masks of pixels without a label (sparse labels), as 255, where the data name none."
)
ROOT = Option(help="The folder that a datalist's files lie in. [default: the datalist's own]")
RESUMABLE = (  # settings that a run may go on with
    *("epochs", "device", "precision", "workers", "devices", "nodes", "keep", "save_every", "on_nan"),
    *("cache", "cache_gb", "cache_dir"),
)
Device = Annotated[str, Option(help="auto, cpu, cuda or cuda:N.")]


@app.callback()
def _root(ctx: typer.Context, debug: Debug = False) -> None:
    processes = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
    if processes > 1 and ctx.invoked_subcommand != "train":
        raise ValueError(
            f"noisyseg {ctx.invoked_subcommand} runs as one process, and torchrun has started {processes}; start one "
            "without torchrun, or several with a part of the files each (--device cuda:N)"
        )


@app.command()
def demo(
    folder: Annotated[Path, Option("--out", help="Where the results go.")] = Path("runs/demo"),
    quick: Annotated[
        bool, Option("--quick", help="One epoch of a tiny network, to try the machinery.")
    ] = False,
) -> None:
    """Train on the built-in CT nodules: what noisy masks cost, and what NR-Dice wins back.

    At most 4 minutes on 2 cores.

    Example: `noisyseg demo --out runs/demo`
    """
    from . import timing
    from .training import demo as demonstration

    results = demonstration.train_arms(folder, quick=quick, console=out)
    table = Table(title="Test set, against the consensus of four radiologists")
    for name in ("training", "Dice", "IoU", "HD95 [mm]", "without HD95"):
        table.add_column(name, justify="left" if name == "training" else "right")
    for row in demonstration.table(results):
        numbers = (f"{row['dice']:.4f}", f"{row['iou']:.4f}", f"{row['hd95']:.2f}", str(row["without_hd95"]))
        table.add_row(row["training"], *numbers)
    out.print(table)
    out.print(demonstration.verdict(results))
    out.print("timing our operations against their peers on this machine ...")
    rows = timing.demo_table(budget_s=3.0 if quick else 40.0)
    timing.print_table(rows)
    demonstration.write(folder, results, [("Time of the operations on this machine", rows)])
    _say("report", folder / "report.html")


@app.command()
def train(
    data: Annotated[str | None, Option(help=f"{SOURCE} [default: sample]", metavar=METAVAR)] = None,
    data_root: Annotated[Path | None, ROOT] = None,
    method: Annotated[str | None, Option(help="See `noisyseg methods`. [default: ce]")] = None,
    set_: Annotated[
        list[str] | None, Option("--set", help="An option of the method, as gamma=1.3; repeatable.")
    ] = None,
    network: Annotated[
        str | None,
        Option(
            help="unet, basicunet, scse_unet, attention_unet, segresnet, dynunet, vnet, vnet_group, vnet_instance, "
            "vnet_plain, monai_vnet, coplenet; NAME-2d takes volumes slice by slice. "
            "[default: the method's, mostly unet]"
        ),
    ] = None,
    width: Annotated[int | None, Option(help="Channels on the finest level. [default: 16]")] = None,
    epochs: Annotated[int | None, Option(help="[default: 100]")] = None,
    batch_size: Annotated[int | None, Option(help="[default: 16]")] = None,
    lr: Annotated[float | None, Option(help="Learning rate. [default: 0.001]")] = None,
    noise_rate: Annotated[
        float | None, Option(help="Share of training labels to dilate by 0-6 pixels. [default: 0]")
    ] = None,
    meta_fraction: Annotated[
        float | None,
        Option(
            help="Share of the training patients whose labels are clean, where the data mark none. [default: 0]"
        ),
    ] = None,
    train_on: Annotated[
        str | None,
        Option(help="training (the perhaps noisy cases), meta (the clean ones) or both. [default: training]"),
    ] = None,
    patch: Annotated[
        str | None, Option(help="Patch size, as 96x96x32. [default: the image, or 256^2, 64^3]")
    ] = None,
    ignore_label: Annotated[int | None, IGNORE] = None,
    spacing: Annotated[
        str | None,
        Option(help="Resample all images to this voxel spacing in mm, as 1,1,1. [default: as they are]"),
    ] = None,
    schedule: Annotated[
        str | None, Option(help="Of lr: poly, constant, halve or tenth. [default: poly]")
    ] = None,
    optimizer: Annotated[str | None, Option(help="adam, or sgd with momentum 0.9. [default: adam]")] = None,
    patience: Annotated[
        int | None, Option(help="Stop after so many epochs without a better validation Dice.")
    ] = None,
    settings: Annotated[
        Path | None,
        Option("--config", help="YAML or JSON of settings, as a run's config.json; options here go first."),
    ] = None,
    seed: Annotated[int | None, Option(help="[default: 0]")] = None,
    folder: Annotated[
        Path | None, Option("--out", help="A new folder for the run. [default: runs/train]")
    ] = None,
    resume: Annotated[
        Path | None,
        Option(
            help="Go on with the run in this folder; only --epochs, --device, --precision, --workers, --devices, "
            "--nodes, --keep, --save-every, --on-nan and --cache... may change."
        ),
    ] = None,
    device: Annotated[str | None, Option(help="auto, cpu, cuda or cuda:N. [default: auto]")] = None,
    precision: Annotated[
        str | None, Option(help="32-true, bf16-mixed or 16-mixed. [default: 32-true]")
    ] = None,
    workers: Annotated[int | None, Option(help="Processes that prepare batches. [default: 0]")] = None,
    cache: Annotated[
        str | None,
        Option(help="Where loaded cases are kept: memory, disk or none (read again). [default: memory]"),
    ] = None,
    cache_gb: Annotated[float | None, Option(help="Memory for them at most. [default: 4]")] = None,
    cache_dir: Annotated[
        Path | None, Option(help="Folder for --cache disk. [default: noisyseg in the user's cache folder]")
    ] = None,
    devices: Annotated[
        int | None,
        Option(help="GPUs, or processes on the CPU, that train together on each computer. [default: 1]"),
    ] = None,
    nodes: Annotated[int | None, Option(help="Computers that train together. [default: 1]")] = None,
    keep: Annotated[
        int | None,
        Option(help="Checkpoints to go on from: last.pt, last-1.pt, the one before it, ... [default: 2]"),
    ] = None,
    save_every: Annotated[
        int | None, Option(help="Steps after which last.pt is written too. [default: after each epoch only]")
    ] = None,
    on_nan: Annotated[
        str | None,
        Option(
            help="When a loss or a parameter is not finite: stop before that step, or skip it, at most 9 in a row; "
            "nan-step-N.pt keeps it. [default: stop]"
        ),
    ] = None,
) -> None:
    """Train a network on the sample, a folder or a datalist, and test it against the raters' consensus.

    Example: `noisyseg train --data sample --method nr_dice --noise-rate 0.4 --out runs/nr_dice`

    Example: `noisyseg train --data sample --method mcpm --noise-rate 0.4 --meta-fraction 0.15 --out runs/mcpm`

    Example: `noisyseg train --data DIR --method nr_dice --set gamma=1.3 --epochs 200`, where DIR holds
    imagesTr/ and labelsTr/ as for nnU-Net (several raters: labelsTr/CASE_rater0.nii.gz, ...)

    Example: `noisyseg train --resume runs/nr_dice` goes on where a run stopped, to the bit.

    SIGINT (Ctrl-C) and SIGTERM: the step is finished, last.pt is written, and the exit code is 128 and the signal's
    number, as shells and schedulers report one: 130 or 143. A second one, a second later or more (SIGTERM: three),
    ends the process at once. Other codes: 0 done, 1 an error of this program, 2 bad settings, data, files or a loss
    that is not finite.
    """
    import dataclasses

    from .training import engine, parallel

    given: dict[str, Any] = {
        "data": data,
        "data_root": str(data_root) if data_root else None,
        "method": method,
        "options": _options(set_) if set_ else None,
        "network": network,
        "width": width,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "noise_rate": noise_rate,
        "meta_fraction": meta_fraction,
        "train_on": train_on,
        "patch": _size(patch) if patch else None,
        "ignore_label": ignore_label,
        "spacing": _spacing(spacing) if spacing else None,
        "optimizer": optimizer,
        "schedule": schedule,
        "patience": patience,
        "seed": seed,
        "out": str(folder) if folder else None,
        "device": device,
        "precision": precision,
        "workers": workers,
        "cache": cache,
        "cache_gb": cache_gb,
        "cache_dir": str(cache_dir) if cache_dir else None,
        "devices": devices,
        "nodes": nodes,
        "keep": keep,
        "save_every": save_every,
        "on_nan": on_nan,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if resume is None:
        config = engine.load_config(settings) if settings else engine.Config()
        # The file's options are its method's; --set changes those that it names.
        kept = config.options if given.get("method", config.method) == config.method else {}
        given["options"] = {**kept, **given.get("options", {})}
        config = dataclasses.replace(config, **given)
    else:
        if settings is not None:
            raise ValueError("--resume takes its settings from the run's folder, not from --config")
        for name in given:
            if name not in RESUMABLE:
                raise ValueError(
                    f"--resume takes its settings from {resume / 'config.json'}; "
                    f"--{name.replace('_', '-')} cannot be changed"
                )
        config = dataclasses.replace(engine.read_config(resume), **given)
    try:
        result = engine.train(config, resume=resume is not None, console=out)
    except KeyboardInterrupt as stop:
        if not _another_says(stop):
            print(f"noisyseg: interrupted; noisyseg train --resume {config.out} goes on", file=sys.stderr)
        raise typer.Exit(getattr(stop, "code", 130)) from None
    if parallel.place():  # the first process says it
        return
    out.print(f"test: {result.test.sentence(result.unit)}", highlight=False)
    _say("checkpoint", result.out / "best.pt")
    _say("report", result.out / "report.html")


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="best.pt of a run.")],
    data: Annotated[str | None, Option(help=f"{SOURCE} [default: the run's]", metavar=METAVAR)] = None,
    split: Annotated[str, Option(help="training, validation, test, meta or all.")] = "test",
    file: Annotated[Path | None, Option("--out", help="CSV with a row for each case.")] = None,
    data_root: Annotated[Path | None, ROOT] = None,
    ignore_label: Annotated[int | None, IGNORE] = None,
    device: Device = "auto",
) -> None:
    """Dice, IoU and HD95 of a trained network against the raters' consensus, case by case.

    Example: `noisyseg evaluate runs/nr_dice/best.pt --data DIR --split all --out scores.csv`

    Without --data it is the run's own data; the split by patient is the run's. Pixels without a label do not count;
    a mask that has any gets no HD95.
    """
    import dataclasses

    from .training import evaluate as scoring
    from .training.data import Store
    from .training.engine import config_of, open_run, progress
    from .training.model import load_model, pick_device, read_checkpoint

    place = pick_device(device)
    state = read_checkpoint(checkpoint)
    try:
        config = config_of(state["config"])
    except ValueError as error:
        raise ValueError(f"{checkpoint}: cannot be read as a checkpoint: {error}") from error
    if ignore_label is not None:
        config = dataclasses.replace(config, ignore_label=ignore_label)
    if data_root is not None:
        config = dataclasses.replace(config, data_root=str(data_root))
    source = open_run(config, data)
    cases = source.split(split)
    method, spec = load_model(state, place)
    if source.classes != spec.classes:
        raise ValueError(f"{source.source} has {source.classes} classes, the model {spec.classes}")
    store = Store(source.classes, spacing=spec.spacing)
    with progress(out) as bars:
        task = bars.add_task("evaluating", total=len(cases), note="")
        for case in cases:
            shape = store.get(case).image.shape
            if (shape[0], len(shape) - 1) != (spec.channels, spec.spatial_dims):
                raise ValueError(
                    f"case {case.id} has {shape[0]} channel(s) and {len(shape) - 1} spatial axes; "
                    f"the model takes {spec.channels} and {spec.spatial_dims}"
                )
        scores = scoring.evaluate(method, cases, store, spec.patch, place, seen=lambda: bars.advance(task))
    out.print(scoring.summarize(scores).sentence(source.unit), highlight=False)
    if file is not None:
        scoring.write_scores(file, scores)
        _say("scores", file)


@app.command()
def predict(
    checkpoint: Annotated[Path, typer.Argument(help="best.pt of a run.")],
    images: Annotated[
        list[Path], typer.Argument(help="Image files (.nii.gz, .nii, .png), or folders of them.")
    ],
    folder: Annotated[Path, Option("--out", help="Folder for the masks.")],
    flips: Annotated[
        bool,
        Option("--flips", help="Average the probabilities over all flips: 4 passes for 2D models, 8 for 3D."),
    ] = False,
    largest_component: Annotated[
        bool,
        Option(
            "--largest-component", help="Keep only the largest component of each class (8 or 26 neighbours)."
        ),
    ] = False,
    overlap: Annotated[float, Option(help="Share of a window that the next one covers too.")] = 0.5,
    axis: Annotated[
        str | None,
        Option(
            help="Slices that a 2D model takes of a volume: sagittal, coronal or axial. "
            "[default: across the largest spacing]"
        ),
    ] = None,
    resume: Annotated[
        bool, Option("--resume", help="Go on with an interrupted run: keep what --out holds of the same run.")
    ] = False,
    device: Device = "auto",
) -> None:
    """Write the masks of new images: NIfTI uint8 with the image's affine; PNG for PNG.

    Example: `noisyseg predict runs/nr_dice/best.pt scans/ --out masks/`

    Example: `noisyseg predict runs/nr_dice/best.pt scans/ --out masks/ --flips --largest-component --resume`
    """
    from .training import predict as prediction
    from .training.engine import progress
    from .training.model import load_model, pick_device, read_checkpoint

    place = pick_device(device)
    method, spec = load_model(read_checkpoint(checkpoint), place)
    options = prediction.Options(overlap, flips, largest_component, axis)
    options.check(spec)
    todo = prediction.jobs(images, folder, spec.channels)
    journal = prediction.Journal(folder, checkpoint, options, resume)
    left = journal.left(todo)
    try:
        with progress(out) as bars:
            task = bars.add_task("reading", total=len(left), note="")
            prediction.check(left, spec, options, lambda: bars.advance(task))
            bars.remove_task(task)
            task = bars.add_task("predicting", total=len(left), note="")
            seen = partial(bars.advance, task)
            prediction.predict(method, spec, left, place, seen, options=options, journal=journal)
    except KeyboardInterrupt:
        print("noisyseg: interrupted; the same command with --resume goes on", file=sys.stderr)
        raise typer.Exit(130) from None
    kept = f" ({len(todo) - len(left)} of them were there)" if len(left) < len(todo) else ""
    _say(f"{len(todo)} mask(s){kept}", folder)


@app.command()
def reproduce(
    study: Annotated[str, typer.Argument(help="Which: mcpm, umanet, coplenet or dtml.")],
    data: Annotated[str, Option(help=SOURCE, metavar=METAVAR)] = "sample",
    seeds: Annotated[int, Option(help="How many, from 0.")] = 3,
    budget: Annotated[int | None, Option(help="Iterations of every run. [default: the study's]")] = None,
    arm: Annotated[list[str] | None, Option(help="Only this arm; repeatable. [default: the paper's]")] = None,
    condition: Annotated[list[str] | None, Option(help="Only under this condition; repeatable.")] = None,
    folder: Annotated[Path | None, Option("--out", help="[default: runs/STUDY]")] = None,
    quick: Annotated[bool, Option("--quick", help="Tiny runs, to try the machinery.")] = False,
) -> None:
    """Repeat a paper's comparison, with the same budget for all arms. Interrupted, it goes on when called again.

    Example: `noisyseg reproduce mcpm --data lidc2d_64.npz --seeds 3 --out runs/mcpm`

    Example: `noisyseg reproduce dtml --data DIR`, where DIR holds train.list, test.list and the Left Atrium 2018 cases:
    the paper's experiment
    """
    from .training import reproduce as studies

    folder = folder or Path("runs") / study
    try:
        studies.reproduce(
            study,
            folder,
            data=data,
            seeds=seeds,
            budget=min(budget or 4, 4) if quick else budget,
            arms=arm or (),
            conditions=condition or (),
            quick=quick,
            console=out,
        )
    except KeyboardInterrupt:
        print("noisyseg: interrupted; the same command goes on", file=sys.stderr)
        raise typer.Exit(130) from None
    _say("results", folder / "results.md")


@app.command()
def fuse(
    masks: Annotated[
        list[Path], typer.Argument(help="One file for each rater (.nii.gz, .nii, .png), of one image.")
    ],
    out_file: Annotated[
        Path, Option("--out", "-o", help="The fused mask, in the first file's geometry; mean: fractions.")
    ],
    method: Annotated[str, Option(help="staple, majority, simple or mean.")] = "staple",
    tie: Annotated[
        str | None, Option(help="majority, simple: the label of ties, or lowest or highest. [default: 0]")
    ] = None,
    posterior: Annotated[
        Path | None, Option(help="staple: a NIfTI file for the probability (of each label).")
    ] = None,
    classes: Annotated[
        int | None, Option(help="Labels, 0 included. [default: masks; whatever is not 0 is object]")
    ] = None,
) -> None:
    """Fuse the masks of several raters into one; say how good each rater is and how far they agree.

    Example: `noisyseg fuse --method staple rater1.nii.gz rater2.nii.gz rater3.nii.gz -o fused.nii.gz`
    """
    from rich.markup import escape

    from .training import fusion

    result = fusion.fuse(masks, out_file, method=method, tie=tie, posterior=posterior, classes=classes)
    table = Table(title=f"Raters against {result.against}")
    for name in ("rater", "sensitivity", "specificity", "Dice"):
        table.add_column(name, justify="left" if name == "rater" else "right", overflow="fold")
    for path, scores in zip(masks, result.scores, strict=True):
        table.add_row(escape(str(path)), *(f"{x:.4f}" for x in scores))
    out.print(table)
    out.print(
        f"agreement: mean pairwise Dice {result.dice:.4f}, Fleiss' kappa {result.kappa:.4f}, "
        f"Krippendorff's alpha {result.alpha:.4f}",
        highlight=False,
        soft_wrap=True,
    )
    _say("fused mask", out_file)
    if posterior is not None:
        _say("posterior", posterior)


@app.command()
def corrupt(
    masks: Annotated[Path, typer.Argument(help="Folder of masks (.nii.gz, .nii, .png).")],
    folder: Annotated[Path, Option("--out", help="A new or empty folder for the noisy masks.")],
    noises: Annotated[
        list[str],
        Option(
            "--noise",
            help="dilate, erode, erode_or_dilate, elastic_deform, shift, flip_square, polygonize, erase_component "
            "or distort_boundary; several make a mixture, each as likely or as NAME=PROBABILITY says.",
        ),
    ],
    set_: Annotated[
        list[str] | None,
        Option("--set", help="A parameter, as radius=3; in a mixture as dilate.radius=3; repeatable."),
    ] = None,
    target_dice: Annotated[
        float | None, Option(help="Find the strength that gives this mean Dice, as 0.8.")
    ] = None,
    seed: Annotated[int, Option(help="A file's noise depends on this and on the file's name.")] = 0,
    mm: Annotated[bool, Option("--mm", help="Radii in mm, by the spacing in the files.")] = False,
) -> None:
    """Make masks worse on purpose: noisy masks, noise.json (parameters, seed, Dice) and a contact sheet to look at.

    Example: `noisyseg corrupt labels/ --out noisy/ --noise dilate --set radius=3`

    Example: `noisyseg corrupt labels/ --out noisy/ --noise erode_or_dilate=0.7 --noise distort_boundary=0.25
    --set erode_or_dilate.radius=6,12` (PyMIC's for JSRT, which leaves 5 % clean)

    Example: `noisyseg corrupt labels/ --out noisy/ --noise polygonize --target-dice 0.8`
    """
    from .training import corrupt as corruption
    from .training.engine import progress

    plan = corruption.plan(masks, folder, noises, _options(set_ or []), target_dice, seed, mm)
    with progress(out) as bars:
        task = bars.add_task("corrupting", total=len(plan.files), note="")
        mean = corruption.write(plan, lambda: bars.advance(task))
    out.print(f"mean Dice of the noisy masks: {mean:.4f}", highlight=False)
    _say("contact sheet", folder / corruption.SHEET)


@app.command()
def methods() -> None:
    """List the training methods and their options.

    Example: `noisyseg methods`
    """
    import dataclasses

    from .training.methods import METHODS, configure

    table = Table("method", "what", "options (--set)")
    for name, method in METHODS.items():
        values = dataclasses.asdict(configure(name))
        table.add_row(
            name, (method.__doc__ or "").split("\n")[0], ", ".join(f"{k}={v}" for k, v in values.items())
        )
    out.print(table)


@app.command()
def info() -> None:
    """What this installation holds: build, instruction sets, CUDA, versions, devices.

    Example: `noisyseg info`
    """
    from importlib.metadata import PackageNotFoundError, version

    from . import build_info

    for key, value in build_info().items():
        out.print(f"{key}: {value}", highlight=False, markup=False)
    for package in ("numpy", "torch", "monai", "lightning", "nibabel"):
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "not installed"
        out.print(f"{package}: {found}", highlight=False)
    try:
        import torch
    except ModuleNotFoundError:
        return
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    out.print(f"GPUs: {', '.join(names) or 'none'}", highlight=False, markup=False)


def _options(pairs: list[str]) -> dict[str, str]:
    """["gamma=1.3"] -> {"gamma": "1.3"}"""
    result = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals and value):
            raise ValueError(f"--set must be like gamma=1.3, got {pair!r}")
        result[name] = value
    return result


def _size(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split("x"))
    except ValueError:
        raise ValueError(f"--patch must be like 96x96 or 96x96x32, got {text!r}") from None


def _spacing(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--spacing must be like 1,1 or 1,1,2.5, got {text!r}") from None


def _say(what: str, path: Path) -> None:
    out.print(f"{what}: {path}", highlight=False, markup=False, soft_wrap=True)


def main() -> None:
    """Entry point of the command."""
    app()


if __name__ == "__main__":
    main()
