"""The truncated dense CRF against its definition, pixel by pixel."""

import itertools
import math
import re

import pytest

torch = pytest.importorskip("torch")

from noisyseg_fast.training.crf import mean_field  # noqa: E402


def brute_force(p, image, spacing, iterations, radius, weights, sigmas):
    """Each pixel with every other of its window, in double precision, in plain loops. p (C, *S), image (K, *S)."""
    dims = p.ndim - 1
    places = list(itertools.product(*(range(n) for n in p.shape[1:])))
    offsets = [d for d in itertools.product(range(-radius, radius + 1), repeat=dims) if any(d)]

    def gauss(d, sigma):
        return math.exp(-sum((a * s) ** 2 for a, s in zip(d, spacing, strict=True)) / (2 * sigma**2))

    space, intensity, smooth = sigmas
    norms = [sum(gauss(d, s) for d in offsets) for s in (space, smooth)]
    k = torch.zeros(len(places), len(places), dtype=torch.float64)
    for i, a in enumerate(places):
        for j, b in enumerate(places):
            d = [y - x for x, y in zip(a, b, strict=True)]
            if i == j or max(abs(x) for x in d) > radius:
                continue
            v = ((image[(slice(None), *a)] - image[(slice(None), *b)]) ** 2).sum().item()
            near = weights[0] / norms[0] * gauss(d, space) * math.exp(-v / (2 * intensity**2))
            k[i, j] = near + weights[1] / norms[1] * gauss(d, smooth)
    unary = p.flatten(1).double().log()
    q = unary.softmax(0)
    for _ in range(iterations):
        q = (unary + q @ k.T).softmax(0)
    return q.view(p.shape)


@pytest.mark.parametrize(
    ("shape", "classes", "radius", "spacing"),
    [
        ((6, 5), 2, 2, None),
        ((4, 7), 3, 5, (0.5, 2.0)),
        ((3, 4, 5), 2, 1, (1.0, 1.0, 2.5)),
        ((1, 4), 2, 2, None),
    ],
)
def test_equal_to_the_definition(shape, classes, radius, spacing):
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(2, classes, *shape, generator=generator).softmax(1)
    image = torch.randn(2, 2, *shape, generator=generator)
    options = {
        "appearance": 2.0, "smoothness": 0.7, "sigma_space": 1.5, "sigma_intensity": 0.8, "sigma_smooth": 1.0
    }  # fmt: skip
    found = mean_field(p, image, spacing=spacing, iterations=3, radius=radius, **options)
    for b in range(2):
        expected = brute_force(
            p[b], image[b], spacing or (1.0,) * len(shape), 3, radius, (2.0, 0.7), (1.5, 0.8, 1.0)
        )
        torch.testing.assert_close(found[b].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(24, 24), (12, 12, 12)])
def test_isolated_pixels_go_and_certain_regions_stay(shape):
    label = torch.zeros(shape)
    label[tuple(slice(2, n // 2) for n in shape)] = 1
    image = label[None, None].clone()
    spot = tuple(n - 3 for n in shape)
    seen = 0.1 + 0.8 * label
    seen[spot] = 0.8
    refined = mean_field(torch.stack([1 - seen, seen])[None], image)[0, 1] > 0.5
    assert torch.equal(refined, label > 0)
    # Without neighbours' say it is what it was.
    alone = mean_field(torch.stack([1 - seen, seen])[None], image, appearance=0.0, smoothness=0.0)[0, 1]
    torch.testing.assert_close(alone, seen)


def test_the_border_moves_to_the_edge_in_the_image():
    image = torch.zeros(1, 1, 20, 20)
    image[..., 10:] = 2.0
    seen = torch.full((20, 20), 0.2)
    seen[:, 8:] = 0.8  # two columns too far to the left
    p = torch.stack([1 - seen, seen])[None]
    refined = mean_field(p, image, appearance=6.0, smoothness=0.0, iterations=10)[0, 1] > 0.5
    assert torch.equal(refined, image[0, 0] > 1)
    blind = mean_field(p, torch.zeros_like(image), appearance=6.0, smoothness=0.0, iterations=10)[0, 1] > 0.5
    assert not torch.equal(blind, image[0, 0] > 1)


def test_finite_for_certain_probabilities_and_equal_for_each_image_alone():
    p = torch.zeros(2, 3, 9, 8)
    p[:, 0] = 1
    p[1, 0, :4], p[1, 2, :4] = 0, 1
    image = torch.randn(2, 1, 9, 8, generator=torch.Generator().manual_seed(1)) * 100
    both = mean_field(p, image)
    assert torch.isfinite(both).all()
    torch.testing.assert_close(both.sum(1), torch.ones(2, 9, 8))
    for b in range(2):
        torch.testing.assert_close(mean_field(p[b : b + 1], image[b : b + 1])[0], both[b])
    assert both.dtype == mean_field(p.half(), image.half()).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"radius": 0}, "radius must be at least 1 and iterations at least 0, got 0 and 5"),
        ({"iterations": -1}, "radius must be at least 1 and iterations at least 0, got 5 and -1"),
        ({"sigma_space": 0.0}, "sigma_space must be positive and finite, got 0.0"),
        ({"sigma_intensity": math.inf}, "sigma_intensity must be positive and finite, got inf"),
        ({"appearance": -1.0}, "appearance must be finite and not negative, got -1.0"),
        ({"spacing": (1.0,)}, "spacing must be 2 positive numbers, got (1.0,)"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        mean_field(torch.full((1, 2, 4, 4), 0.5), torch.zeros(1, 1, 4, 4), **options)


def test_shapes_that_differ():
    message = "must have the same 2 or 3 axes S, got (1, 2, 4, 4) and (1, 1, 4, 5)"
    with pytest.raises(ValueError, match=re.escape(message)):
        mean_field(torch.full((1, 2, 4, 4), 0.5), torch.zeros(1, 1, 4, 5))
