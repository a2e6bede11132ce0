"""The dense CRF: its lattice beside the exact filter, and beside pydensecrf where it is there.

pydensecrf's recorded answers are in test_parity.py. Numbers in brackets are rows of AUDIT.md.
"""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import stage1_cam as stage1
from stage1_cam import Lattice, dense_crf

LOSS = (3, 3), (80, 13, 10)  # bandwidths and weights of the boundary loss's CRF


class ExactFilter:
    """exp(-|f - f'|^2 / 2) over all pairs of points: slow, the truth the lattice is near (71).

    features (B, d, ...), as for `Lattice`, whose methods it has as well: nothing happens in splat
    and slice, all in blur.
    """

    def __init__(self, features):
        points = features.flatten(2).transpose(1, 2)  # (B, P, d)
        self.kernel = torch.exp(-0.5 * torch.cdist(points, points).square())  # (B, P, P)

    def splat(self, values):
        return values

    def blur(self, values):
        return (self.kernel @ values.unflatten(0, self.kernel.shape[:2])).flatten(0, 1)

    def slice(self, values, rows=...):
        return values[rows]

    def divide_by_degrees(self, weight):
        norm = self.kernel.sum(2).rsqrt()  # (B, P)
        self.kernel = weight * norm[:, :, None] * self.kernel * norm[:, None]
        return self


def filtered(values, lattice):
    """values (BP, K) after all three steps of a lattice, or of the exact filter."""
    return lattice.slice(lattice.blur(lattice.splat(values)))


def rand(*shape, seed):
    """Numbers in [0, 1), the same each time."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def photo_like(B, K, H, W, seed=0):
    """Smooth random probabilities (B, K, H, W) and an image (B, 3, H, W) of flat patches."""
    smooth = F.interpolate(rand(B, K + 3, 6, 7, seed=seed), (H, W), mode="bicubic")
    image = (smooth[:, K:] > 0.5) * 120 + 60 + 16 * rand(B, 3, H, W, seed=seed)
    return (15 * smooth[:, :K]).softmax(1), image.round()


# ======================================================================================== lattice

@pytest.mark.parametrize("d", [1, 2, 3, 5])
def test_lattice_in_d_dimensions(d):
    """Means are near the exact ones (70). A vertex gets from a point what the point reads there,
    and the weights of a point sum to 1."""
    features = 2 * rand(2, 200, d, seed=1).transpose(1, 2)
    lattice, values = Lattice(features), torch.stack([torch.ones(400), torch.arange(400) % 2.0], 1)
    ours, exact = filtered(values, lattice), filtered(values, ExactFilter(features))
    assert (ours[:, 1] / ours[:, 0] - exact[:, 1] / exact[:, 0]).abs().mean() < 0.02
    splat = lattice.splat(torch.eye(400))  # (M+1, 400)
    torch.testing.assert_close(splat.T, (1 + 2.0 ** -d) * lattice.slice(torch.eye(len(splat))))
    torch.testing.assert_close(splat.sum(0), torch.ones(400))


def test_the_worked_example():
    """The numbers in the comment above `Lattice`."""
    features = torch.tensor([[[0.25, 1.5]]]) * 3 ** 0.5 / 2
    lattice, exact, ones = Lattice(features), ExactFilter(features), torch.ones(2, 1)
    values = torch.tensor([[8.0], [4.0]])
    splat, ours = lattice.splat(values), filtered(values, lattice)
    # In the rows vertices 0 and 2 are corners 0 and come first; the last row is no vertex.
    for found, *numbers in [
            (splat[[0, 2, 1]], 6, 4, 2), (splat[3:], 0),
            (lattice.blur(splat)[[0, 2, 1]], 12, 14, 8), (ours, 8.33, 7.33),
            (filtered(ones, lattice), 1.30, 1.31), (ours / filtered(ones, lattice), 6.40, 5.59),
            (filtered(values, exact) / filtered(ones, exact), 6.57, 5.43)]:
        assert found.flatten().tolist() == pytest.approx(numbers, abs=5e-3)


def test_neighbours_are_mutual():
    lattice = Lattice(3 * rand(2, 60, 3, seed=3).transpose(1, 2))
    itself, ahead, behind = lattice.blur_index.long().unbind(2)  # (4, M+1)
    there = ahead < itself.max()  # the last number stands for a vertex that is absent
    assert there.any() and there.sum() == (behind < itself.max()).sum()
    assert torch.equal(behind.gather(1, ahead)[there], itself[there])


# ============================================================================================ CRF

def test_what_holds_for_any_photo():
    """A batch is its images (99), labels can be swapped, rows sum to 1, and a size seen before
    gives the same: position lattices are kept for two sizes, here a third comes in between."""
    cases = [photo_like(3, 4, height, 18, seed=height) for height in (14, 15, 16)]
    first = [dense_crf(*case, *LOSS) for case in cases]
    for (probs, image), q in zip(cases, first):
        assert torch.equal(dense_crf(probs, image, *LOSS), q)
        torch.testing.assert_close(q.sum(1), torch.ones(q[:, 0].shape))
        alone = [dense_crf(probs[b:b + 1], image[b:b + 1], *LOSS) for b in range(3)]
        torch.testing.assert_close(torch.cat(alone), q, rtol=0, atol=2e-6)
        swapped = dense_crf(probs.flip(1), image, *LOSS).flip(1)
        torch.testing.assert_close(swapped, q, rtol=0, atol=1e-5)


def test_in_a_constant_image_the_majority_wins():
    """Colours tell nothing there, so all pixels pull each other to what most of them are."""
    probs = 0.5 + photo_like(1, 3, 12, 12)[0]
    labels = dense_crf(probs, torch.full((1, 3, 12, 12), 90), *LOSS).argmax(1)
    assert len(probs.argmax(1).unique()) == 3 and (labels == probs.mean((2, 3)).argmax()).all()


def test_with_the_exact_filter_most_labels_are_the_same(monkeypatch):
    probs, image = photo_like(1, 3, 16, 16)
    # the filter of positions as it is without its cache
    monkeypatch.setattr(stage1, "position_filter", stage1.position_filter.__wrapped__)
    ours = dense_crf(probs, image, *LOSS)
    monkeypatch.setattr(stage1, "Lattice", ExactFilter)
    exact = dense_crf(probs, image, *LOSS)
    assert 0.85 < (exact.argmax(1) == ours.argmax(1)).float().mean()


@pytest.mark.parametrize("sxy", [1e-4, 0])
def test_too_fine_bandwidths_are_refused(sxy):
    with pytest.raises(ValueError, match="^dense CRF: .* larger bandwidths .* are needed$"):
        dense_crf(*photo_like(1, 2, 12, 12), (3, 3), (sxy, 1e-4, 1))


@pytest.mark.parametrize("constants", [
    ((3, 3), (83, 5, 3)), ((1, 3), (67, 3, 4)), LOSS])
def test_equals_pydensecrf(constants):
    """The package that the published numbers were made with (69)."""
    densecrf = pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf2 is missing")
    (probs, image), (sxy, srgb, weight) = photo_like(1, 5, 60, 80), constants[1]
    crf = densecrf.DenseCRF2D(80, 60, 5)
    crf.setUnaryEnergy(-probs.log().view(5, -1).numpy())
    crf.addPairwiseGaussian(*constants[0])
    crf.addPairwiseBilateral(sxy, srgb, image[0].byte().permute(1, 2, 0).numpy().copy(), weight)
    theirs = torch.from_numpy(np.array(crf.inference(10))).view(1, 5, 60, 80)
    ours = dense_crf(probs, image, *constants)
    assert (ours.argmax(1) == theirs.argmax(1)).float().mean() >= 0.999
    assert (ours - theirs).abs().mean() < 1e-4
