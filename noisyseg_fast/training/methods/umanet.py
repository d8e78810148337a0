"""UMA-Net: Wang, Luo, Wu, Wang and Chen, "Learning Robust Medical Image Segmentation from Multi-source Annotations",
arXiv 2304.00466v2, 2023. [DEF]: the paper is silent (its code was never released), the value is ours.

A network with a primary and an auxiliary predictor on shared features; an annotation uncertainty estimation module
(AUEM: one encoder, a decoder for each rater), which sees the image and all masks and says how far each pixel of each
mask is to be doubted, sigma in (0, 1); and a quality assessment (QAM) of each image by its calibration maps
|y - sigma|: those of high quality teach the primary predictor, the others the auxiliary one, both the backbone and the
AUEM. Only backbone and primary predictor predict, and only they are in best.pt.

The loss and the scores are `noisyseg_fast.uncertainty_weighted_loss`, which says how they are computed. For more than
two classes each foreground class is one against the rest, with masks and decoder outputs of its own, and an image's
scores are the means over classes [DEF; the paper has two nested classes and does not say].

Know before use, for objects of a few per cent of the image, as nodules are; the paper's lungs fill a third:
- The confidence divides by the foreground, so that the merest doubt of the background makes an image one of low
  quality: with 1 % foreground, sigma = 0.001 all over gives 0.62, the threshold is 0.2. Then the primary predictor
  learns no more after the warm-up. entropy=binary is the remedy; watch the logged high_quality.
- In eq. 3 the error is divided by the foreground, sigma/2 by all pixels. The less foreground, the cheaper is doubt: at
  4 %, the AUEM doubts every foreground pixel that the network gives less than about 0.75, whoever drew it, so that its
  maps end up as copies of the masks. regularizer=area is the remedy.
- Weights exp(-sigma) never fall below 1/e, so doubted pixels are never switched off.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ... import task_losses
from .. import networks, ramps
from ..branches import BranchedUNet
from ..data import MISSING
from ._raters import masks, one_vs_rest, present
from .base import Batch, Inputs, Losses, MakeNetwork, Method, Seen, register


@dataclass(frozen=True)
class Config:
    dice_weight: float = 1.0  # lambda (sec. IV)
    # alpha at its end: "sigmoid-shape", maximum 1 (sec. IV). The shape is [DEF]: ramps.gaussian over the whole
    # run. 0 leaves the consistency out.
    consistency: float = 1.0
    tau_confidence: float = 0.2  # tau_a and tau_b: 0.2 each for lungs and fundus, 0.15 and 0.1 for
    tau_agreement: float = 0.2  # breast MRI (sec. IV)
    entropy: str = (
        "paper"  # of the confidence, eq. 6; "binary": all of the entropy, mean over pixels (at most ln 2)
    )
    # Share of the run in which all images count as high quality and the AUEM is not taught yet [DEF]: taught from the
    # first step, when the network sees no foreground, it learns to doubt all foreground and never comes back.
    warmup: float = 0.3
    # What sigma/2 of eq. 3 is divided by: "paper": the N pixels; "area": twice the denominator of the error beside it.
    # The two agree for objects of a quarter of the image, such as the paper's lungs.
    regularizer: str = "paper"
    # sigma of the untrained AUEM [DEF]. At its natural 0.5 the maps say nothing so long that after the warm-up every
    # image counts as low quality, and the primary predictor learns no more.
    doubt: float = 0.02
    assess: bool = True  # the QAM; false: all images are of high quality
    auxiliary: bool = True  # false: images of low quality are left out (the paper's ablation)
    # Beyond the paper (its second limitation): above 0, an image teaches both predictors, the primary one with weight
    # sigmoid((tau_a - confidence) / soft) * sigmoid((tau_b - agreement) / soft), the auxiliary one with the rest.
    soft: float = 0.0

    def __post_init__(self) -> None:
        for name in ("dice_weight", "consistency", "soft"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")
        for name in ("tau_confidence", "tau_agreement"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 < self.doubt < 1:
            raise ValueError(f"doubt must be between 0 and 1, got {self.doubt}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup must be a share between 0 and 1, got {self.warmup}")
        if self.regularizer not in ("paper", "area"):
            raise ValueError(f"regularizer must be paper or area, got {self.regularizer!r}")
        if self.entropy not in ("paper", "binary"):
            raise ValueError(f"entropy must be paper or binary, got {self.entropy!r}")


class Maps(NamedTuple):
    """What the AUEM and the QAM make of a batch; K foreground classes."""

    uncertainty: Tensor  # (B, K, M, *S) sigma
    calibration: Tensor  # (B, K, M, *S) |y - sigma|, 0 where a rater did not draw
    confidence: Tensor  # (B,)
    agreement: Tensor  # (B,)
    primary: Tensor  # (B,) the primary predictor's share of each image, after the warm-up


@register("umanet")
class UMANet(Method):
    """Uncertainty weighs the pixels of each rater's masks, quality decides which predictor an image teaches.

    Images may have different numbers of raters (beyond the paper, its first limitation): in the AUEM's input the mean
    of those present stands for a missing mask [DEF], and its loss and calibration map do not count.
    """

    Config = Config
    needs: ClassVar[frozenset[str]] = frozenset({"raters"})

    def prepare(self, inputs: Inputs, make_network: MakeNetwork, training: bool) -> None:
        if not training:
            return
        # Predictor: the network's last block, one of the same kind [DEF]. AUEM: a U-Net of the same width [DEF].
        self.auxiliary = networks.head(make_network()) if self.config.auxiliary else None
        self.uncertainty = BranchedUNet(
            inputs.spatial_dims,
            inputs.channels + self.classes * inputs.raters,
            self.classes,
            inputs.width,
            inputs.raters,
        )
        self.uncertainty.start_at(math.log(self.config.doubt / (1 - self.config.doubt)))

    @property
    def classes(self) -> int:
        """K, the foreground classes."""
        return max(1, self.channels - 1)

    def exported(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.state_dict().items() if name.startswith("network.")}

    def training_step(self, batch: Batch, step: int) -> Losses:
        config, raters = self.config, batch["raters"]
        done = step / self.plan.steps
        alpha = config.consistency * ramps.gaussian(step, self.plan.steps)
        sigma, there = self.doubt(batch["image"], raters), present(raters)
        warm = not config.assess or done < config.warmup
        if done < config.warmup:
            sigma = sigma.detach()
        with self._both_predictors(config.auxiliary and not warm):
            logits = self.network(batch["image"]).split(self.channels, 1)
        first = self._terms(logits[0], raters, sigma, there, alpha)
        share = torch.ones_like(first.confidence) if warm else self._share(first.confidence, first.agreement)
        # Over the whole batch, not over either group: an image counts the same whichever predictor it teaches, and
        # an empty group adds nothing [DEF].
        loss = (share * first.total).mean()
        if len(logits) == 2:
            loss = loss + ((1 - share) * self._terms(logits[1], raters, sigma, there, alpha).total).mean()
        parts = {name: getattr(first, name).mean().detach() for name in first._fields if name != "total"}
        return {"loss": loss, **parts, "high_quality": share.mean()}

    def doubt(self, image: Tensor, raters: Tensor) -> Tensor:
        """The AUEM: sigma (B, K, M, *S) in (0, 1)."""
        drawn = masks(raters, self.classes).to(image.dtype)  # (B, K, M, *S)
        there = present(raters).reshape(len(raters), 1, -1, *(1,) * (raters.ndim - 2))
        mean = drawn.sum(2, keepdim=True) / there.sum(2, keepdim=True).clamp(min=1)
        seen = torch.where(there, drawn, mean)
        doubt: Tensor = self.uncertainty(torch.cat([image, seen.flatten(1, 2)], 1))
        return doubt.transpose(1, 2).float().sigmoid()

    @torch.no_grad()
    def maps(self, batch: Batch) -> Maps:
        """What training now makes of a batch with its raters, for those who want to look."""
        raters = batch["raters"]
        sigma, there = self.doubt(batch["image"], raters), present(raters)
        terms = self._terms(self(batch["image"]), raters, sigma, there, 0.0)
        drawn = there.reshape(len(raters), 1, -1, *(1,) * (raters.ndim - 2))
        calibration = (masks(raters, self.classes) - sigma).abs() * drawn
        share = (
            self._share(terms.confidence, terms.agreement)
            if self.config.assess
            else torch.ones_like(terms.agreement)
        )
        return Maps(sigma, calibration, terms.confidence, terms.agreement, share)

    def explain(self, batch: Batch) -> list[Seen]:
        found, classes = self.maps(batch), self.classes
        drawn = torch.where(batch["raters"] == MISSING, 0, batch["raters"]).float() / classes
        seen = []
        for i, share in enumerate(found.primary.tolist()):
            facts: dict[str, float | str] = {
                "confidence": float(found.confidence[i]),
                "agreement": float(found.agreement[i]),
                "quality": f"{share:.0%} high" if 0 < share < 1 else "high" if share else "low",
            }
            # Of several classes, what is most doubted, and all of the foreground.
            sigma, calibration = found.uncertainty[i].amax(0), found.calibration[i].amax(0)
            maps = {"annotations": drawn[i], "uncertainty": sigma, "calibration maps": calibration}
            seen.append(Seen(facts, maps))
        return seen

    def _share(self, confidence: Tensor, agreement: Tensor) -> Tensor:
        """(B,): how much of each image is the primary predictor's."""
        a: Tensor = self.config.tau_confidence - confidence
        b: Tensor = self.config.tau_agreement - agreement
        soft: float = self.config.soft
        if soft:
            return (a / soft).sigmoid() * (b / soft).sigmoid()
        return ((a > 0) & (b > 0)).to(confidence.dtype)

    def _terms(self, logits: Tensor, raters: Tensor, sigma: Tensor, there: Tensor, alpha: float) -> Any:
        """The terms of eq. 8 and the scores, each (B,): means over the K classes."""
        terms = task_losses.uncertainty_weighted_loss(
            one_vs_rest(logits).flatten(0, 1)[:, None],
            masks(raters, self.classes).flatten(0, 1),
            sigma.flatten(0, 1),
            dice_weight=self.config.dice_weight,
            consistency_weight=alpha,
            raters=there.repeat_interleave(self.classes, 0),
            entropy=self.config.entropy,
            reduction="image",
        )
        terms = terms._make(term.reshape(-1, self.classes).mean(1) for term in terms)
        if self.config.regularizer == "area":
            more = self.config.dice_weight * _by_area(logits, raters, sigma, there, self.classes)
            terms = terms._replace(total=terms.total + more)
        return terms

    @contextmanager
    def _both_predictors(self, wanted: bool) -> Iterator[None]:
        """Inside, the network gives the logits of both predictors, one after the other along the channels."""
        auxiliary = self.auxiliary
        if not wanted or auxiliary is None:
            yield
            return

        def add(_: Any, features: tuple[Tensor, ...], logits: Tensor) -> Tensor:
            return torch.cat([logits, auxiliary(features[0])], 1)

        hook = networks.head(self.network).register_forward_hook(add)
        try:
            yield
        finally:
            hook.remove()


def _by_area(logits: Tensor, raters: Tensor, sigma: Tensor, there: Tensor, classes: int) -> Tensor:
    """(B,): sum_i sigma_i/2 (1 / (2 (sum p^2 + sum y^2)) - 1/N), the mean over raters and classes: what
    regularizer="area" adds to eq. 3."""
    drawn, doubted = masks(raters, classes).flatten(3).sum(3), sigma.flatten(3).sum(3) / 2  # (B, K, M)
    p = one_vs_rest(logits.detach()).float().sigmoid().flatten(2).square().sum(2)
    area = (p[..., None] + drawn).clamp(min=1)
    pixels = math.prod(raters.shape[2:])
    each = doubted * (0.5 / area - 1 / pixels) * there[:, None]
    return each.sum(2).mean(1) / there.sum(1)
