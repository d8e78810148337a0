"""Each operation once, small and large: what bench/gpu/run.sh profiles."""

import torch

import noisyseg_fast as nf

for shape in ((128, 1, 64, 64), (4, 1, 112, 112, 80)):
    logits = torch.randn(shape, device="cuda", requires_grad=True)
    labels = (torch.rand((shape[0], *shape[2:]), device="cuda") > 0.5).to(torch.uint8)
    shifted, dims = labels.roll(1, -1), len(shape) - 2
    nf.nr_dice_loss(logits, labels).backward()
    nf.dice_loss(logits, labels).backward()
    nf.pixel_loss(logits, labels, activation="sigmoid").backward()
    nf.distance_transform_edt(labels, spatial_dims=dims)
    nf.signed_distance_map(labels, spatial_dims=dims)
    nf.surface_metrics(labels, shifted, spatial_dims=dims)
    nf.surface_metrics(labels, shifted, spatial_dims=dims, definition="deepmind")
    nf.overlap_metrics(labels, shifted, spatial_dims=dims)
    nf.overlap_metrics(logits.detach(), labels)
    raters = torch.stack([labels, shifted, labels.roll(1, 1), labels], 1)
    nf.staple(raters, spatial_dims=dims)
    nf.majority_vote(raters, spatial_dims=dims)
    nf.soft_average(raters.half(), spatial_dims=dims)
torch.cuda.synchronize()
