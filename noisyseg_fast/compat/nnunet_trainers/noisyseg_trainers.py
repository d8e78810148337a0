"""The classes that `nnUNetv2_train -tr NAME` finds; noisyseg_fast/compat/nnunet.py says how."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from noisyseg_fast import nr_dice_loss, pixel_loss
from noisyseg_fast.compat.nnunet import Loss
from noisyseg_fast.training import methods
from noisyseg_fast.training.files import written


class nnUNetTrainerNoisyseg(nnUNetTrainer):  # type: ignore[misc]
    """nnU-Net with one of our losses at each of its resolutions; a base for your own."""

    def our_loss(self) -> Callable[..., Any]:
        """(logits, target, *, activation, mask) -> a scalar."""
        raise NotImplementedError("choose a class that says which loss, such as nnUNetTrainerNRDice")

    def _build_loss(self) -> Any:
        ours = Loss(self.our_loss(), self.label_manager.has_regions, self.label_manager.ignore_label)
        if not self.enable_deep_supervision:
            return ours
        wrapped = super()._build_loss()  # with nnU-Net's weights of the resolutions
        wrapped.loss = ours
        return wrapped


class nnUNetTrainerNRDice(nnUNetTrainerNoisyseg):
    """Noise-robust Dice (Wang et al., TMI 2020, eq. 3) with gamma 1.5, of each image and foreground class."""

    def our_loss(self) -> Callable[..., Any]:
        return partial(nr_dice_loss, include_background=self.label_manager.has_regions)


class nnUNetTrainerGCE(nnUNetTrainerNoisyseg):
    """Generalised cross-entropy (Zhang and Sabuncu, NeurIPS 2018) with q = 0.7."""

    def our_loss(self) -> Callable[..., Any]:
        return partial(pixel_loss, kind="gce", q=0.7)


class nnUNetTrainerMCPM(nnUNetTrainer):  # type: ignore[misc]
    """Meta corrupted pixels mining (Wang et al., MICCAI 2020): a small network, taught by a few clean cases, weighs
    each pixel of the others.

    `clean_cases.json`, beside nnU-Net's `splits_final.json`, lists the cases whose labels can be trusted. Those in the
    fold's training part teach, and are not otherwise trained on. The loss is weighted cross-entropy in float32, without
    deep supervision, since a pixel has one weight; one process. ValueError for regions, an ignore label, several
    processes, a missing list, or a fold without clean cases. What the small network has learnt is kept beside each
    checkpoint, in NAME_mcpm.pth.
    """

    method = "mcpm"

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008  # nnU-Net's signature, which it inspects
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.enable_deep_supervision = False
        self.taking = "noisy"  # which cases `do_split` gives as training part
        self.clean_batches: Any = None

    def initialize(self) -> None:
        for name, there in (
            ("regions", self.label_manager.has_regions),
            ("an ignore label", self.label_manager.ignore_label is not None),
            ("several processes", self.is_ddp),
        ):
            if there:
                raise ValueError(f"{type(self).__name__} does not work with {name}")
        super().initialize()
        self.grad_scaler = None
        heads = self.label_manager.num_segmentation_heads
        dims = len(self.configuration_manager.patch_size)
        inputs = methods.Inputs(dims, self.num_input_channels, raters=1, width=0)
        ours = methods.create(self.method, {}, lambda heads=1: self.network, heads, inputs)
        ours.plan = methods.Plan(
            self.optimizer, self.num_epochs * self.num_iterations_per_epoch, self.num_iterations_per_epoch
        )
        self.ours = ours.to(self.device)
        self.own_lr = {name: o.param_groups[0]["lr"] for name, o in ours.optimizers.items()}

    # -- two kinds of cases --

    def clean_cases(self) -> set[str]:
        path = Path(self.preprocessed_dataset_folder_base) / "clean_cases.json"
        if not path.is_file():
            raise ValueError(
                f"{path}: no such file; {type(self).__name__} needs a list of cases with clean labels"
            )
        cases = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(cases, list) or not all(isinstance(case, str) for case in cases):
            raise ValueError(f'{path}: must be a list of case identifiers, as ["case_001", "case_007"]')
        return set(cases)

    def do_split(self) -> tuple[list[str], list[str]]:
        training, validation = super().do_split()
        clean = self.clean_cases()
        chosen = [case for case in training if (case in clean) == (self.taking == "clean")]
        if not chosen:
            raise ValueError(f"fold {self.fold}: none of its {len(training)} training cases is {self.taking}")
        return chosen, list(validation)

    def get_dataloaders(self) -> tuple[Any, Any]:
        self.taking = "clean"
        self.clean_batches, spare = super().get_dataloaders()
        _finish(spare)
        self.taking = "noisy"
        loaders: tuple[Any, Any] = super().get_dataloaders()
        return loaders

    def on_train_end(self) -> None:
        super().on_train_end()
        _finish(self.clean_batches)

    # -- a step --

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        decay = self.optimizer.param_groups[0]["lr"] / self.initial_lr
        for name, optimizer in self.ours.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self.own_lr[name] * decay
        self.step = self.current_epoch * self.num_iterations_per_epoch

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        mine: Any = {**self._batch(batch), "meta": self._batch(next(self.clean_batches))}
        loss = self.ours.training_step(mine, self.step)["loss"]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 12)  # nnU-Net's
        self.optimizer.step()
        self.ours.after_step(self.step)
        self.step += 1
        return {"loss": loss.detach().cpu().numpy()}

    def _batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        image = batch["data"].to(self.device, non_blocking=True)
        label = batch["target"].to(self.device, non_blocking=True)[:, 0].to(torch.uint8)
        return {"image": image, "label": label, "index": torch.zeros(len(image), dtype=torch.int64)}

    # -- files --

    def save_checkpoint(self, filename: str) -> None:
        super().save_checkpoint(filename)
        if not self.disable_checkpointing:
            own = {k: v for k, v in self.ours.state_dict().items() if not k.startswith("network.")}
            optimizers = {name: o.state_dict() for name, o in self.ours.optimizers.items()}
            with written(self._beside(filename)) as temporary:
                torch.save({"method": own, "optimizers": optimizers}, temporary)

    def load_checkpoint(self, filename_or_checkpoint: Any) -> None:
        super().load_checkpoint(filename_or_checkpoint)
        path = self._beside(filename_or_checkpoint)
        if path.is_file():  # prediction does without
            state = torch.load(path, map_location=self.device, weights_only=True)
            self.ours.load_state_dict(state["method"], strict=False)
            for name, optimizer in self.ours.optimizers.items():
                optimizer.load_state_dict(state["optimizers"][name])

    def _beside(self, filename: str) -> Path:
        path = Path(filename)
        return path.with_name(f"{path.stem}_{self.method}.pth")


def _finish(loader: Any) -> None:
    """Ends the worker processes of nnU-Net's loaders that have any."""
    if hasattr(loader, "_finish"):
        loader._finish()
