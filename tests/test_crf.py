"""The dense CRF: lattice against the exact filter and against pydensecrf (recorded outputs: test_parity.py)."""
import sys
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench import pydensecrf
from stage1_cam import ExactFilter, Lattice, dense_crf, memory_for


def photo_like(B, K, H, W, seed=0):
    """Smooth random probabilities (B, K, H, W) and an image (B, 3, H, W) of flat patches with noise."""
    g = torch.Generator().manual_seed(seed)
    smooth = lambda c: F.interpolate(torch.randn(B, c, 6, 7, generator=g), (H, W), mode="bicubic")
    image = (smooth(3) > 0).float() * 120 + 60 + 8 * torch.randn(B, 3, H, W, generator=g)
    return (3 * smooth(K)).softmax(1), image.clamp(0, 255).round()


@pytest.mark.parametrize("d", [2, 5])
def test_lattice_is_near_the_exact_filter(d):
    g = torch.Generator().manual_seed(1)
    features, values = 2 * torch.rand(2, 400, d, generator=g), torch.rand(2, 400, 3, generator=g)
    normed = lambda k: k(values) / k(torch.ones(2, 400, 1))
    assert (normed(Lattice(features)) - normed(ExactFilter(features))).abs().mean() < 0.02


def test_the_worked_example():
    """The numbers in the comment above `Lattice`."""
    features = torch.tensor([[[0.25], [1.5]]]) * np.sqrt(3) / 2
    values, ones = torch.tensor([[[8.0], [4.0]]]), torch.ones(1, 2, 1)
    lattice, exact = Lattice(features), ExactFilter(features)

    def equal(found, *numbers):
        np.testing.assert_allclose(found.flatten(), numbers, rtol=0, atol=5e-3)
    splat = lattice.splat(values[0])
    order = [0, 2, 1]  # vertices 0 and 2 are corners 0 and come first; the last row is no vertex
    equal(splat[order], 6, 4, 2)
    equal(lattice.blur(splat)[order], 12, 14, 8)
    equal(splat[3:], 0)
    equal(lattice(values), 8.33, 7.33)
    equal(lattice(ones), 1.30, 1.31)
    equal(lattice(values) / lattice(ones), 6.40, 5.59)
    equal(exact(values) / exact(ones), 6.57, 5.43)


@pytest.mark.parametrize("d", [1, 2, 3, 5])
def test_splat_is_the_transpose_of_slice_and_the_gain_is_about_one(d):
    """What is splat at a vertex is what slice reads there; far inside, a constant stays itself."""
    g = torch.Generator().manual_seed(2)
    lattice = Lattice(2 * torch.rand(1, 50, d, generator=g))
    matrix = lattice.splat(torch.eye(50))                                            # (M+1, 50)
    read = lattice.slice(torch.eye(len(matrix))) * (1 + 2.0 ** -d)                   # (50, M+1)
    torch.testing.assert_close(matrix.T, read)
    torch.testing.assert_close(matrix.sum(0), torch.ones(50))


def test_neighbours_are_mutual():
    lattice = Lattice(3 * torch.rand(2, 60, 3, generator=torch.Generator().manual_seed(3)))
    me, plus, minus = lattice.blur_index.unflatten(1, (-1, 3)).long().unbind(2)      # (4, M+1) each
    absent = me.shape[1] - 1
    for axis in range(4):
        there = plus[axis] < absent
        assert there.any() and torch.equal(minus[axis][plus[axis][there]], me[axis][there])
        assert there.sum() == (minus[axis] < absent).sum()


def test_labels_that_go_in_parts_come_out_the_same():
    lattice = Lattice(torch.rand(1, 1000, 5, generator=torch.Generator().manual_seed(4)) * 9)
    x = torch.rand(len(lattice.blur_start), 2200, generator=torch.Generator().manual_seed(5))
    assert x.numel() > 2 ** 23  # else it is one part
    assert torch.equal(lattice.blur(x)[:, ::9], lattice.blur(x[:, ::9].contiguous()))


def test_a_size_seen_before_gives_the_same():
    """The position lattice is kept for two sizes; a third comes and goes in between."""
    cases = [photo_like(1, 3, h, 18, seed=h) for h in (14, 15, 16)]
    first = [dense_crf(*case) for case in cases]
    assert all(torch.equal(dense_crf(*case), q) for case, q in zip(cases, first))


@pytest.mark.parametrize("error", [lambda: torch.empty(2 ** 56, dtype=torch.uint8),
                                   lambda: exhausted(MemoryError()),
                                   lambda: exhausted(torch.OutOfMemoryError("CUDA out of memory"))])
def test_memory_that_runs_out_is_one_line(error):
    with pytest.raises(MemoryError, match="^a thing needs about 1.5 GiB$"):
        with memory_for("a thing", 3 * 2 ** 29):
            error()


def exhausted(error):
    raise error


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shape"):
        with memory_for("a thing", 1):
            raise RuntimeError("shape mismatch")


def test_exact_filter_by_hand():
    f, v = torch.tensor([[[0.0], [1.0]]]), torch.tensor([[[1.0], [2.0]]])
    e = np.exp(-0.5)
    torch.testing.assert_close(ExactFilter(f)(v), torch.tensor([[[1 + 2 * e], [e + 2]]], dtype=torch.float32))


def test_a_batch_is_its_images():
    probs, image = photo_like(3, 4, 20, 24)
    together = dense_crf(probs, image)
    for b in range(3):
        torch.testing.assert_close(together[b:b + 1], dense_crf(probs[b:b + 1], image[b:b + 1]), rtol=0, atol=2e-6)


def test_classes_can_be_swapped_and_rows_sum_to_one():
    probs, image = photo_like(1, 4, 20, 24)
    q = dense_crf(probs, image)
    torch.testing.assert_close(q.sum(1), torch.ones(1, 20, 24))
    torch.testing.assert_close(dense_crf(probs.flip(1), image).flip(1), q, rtol=0, atol=1e-5)


def test_without_neighbours_nothing_changes():
    probs, image = photo_like(1, 3, 12, 12)
    torch.testing.assert_close(dense_crf(probs, image, (3, 0), (80, 13, 0)), probs, rtol=0, atol=1e-6)


def test_edges_are_followed():
    """Two flat colours, noisy probabilities: the answer has the colours' border."""
    image = torch.zeros(1, 3, 24, 24)
    image[..., 12:] = 200
    truth = (torch.arange(24) >= 12).float().expand(1, 1, 24, 24)
    p = (0.6 * truth + 0.4 * (1 - truth) + 0.25 * torch.randn(1, 1, 24, 24, generator=torch.Generator().manual_seed(0)))
    p = p.clamp(0.05, 0.95)
    q = dense_crf(torch.cat([1 - p, p], 1), image)
    assert ((p > 0.5) != (truth > 0.5)).float().mean() > 0.2 and torch.equal(q[:, 1:] > 0.5, truth > 0.5)


def test_exact_option():
    probs, image = photo_like(1, 3, 16, 16)
    assert (dense_crf(probs, image, exact=True).argmax(1) == dense_crf(probs, image).argmax(1)).float().mean() > 0.85


def test_too_fine_bandwidths_are_refused():
    probs, image = photo_like(1, 2, 12, 12)
    with pytest.raises(ValueError, match="bandwidths"):
        dense_crf(probs, image, (3, 3), (1e-4, 1e-4, 1))


@pytest.mark.parametrize("gaussian, bilateral", [((3, 3), (83, 5, 3)), ((1, 3), (67, 3, 4)), ((3, 3), (80, 13, 10))])
def test_equals_pydensecrf(gaussian, bilateral):
    pytest.importorskip("pydensecrf.densecrf", reason="pip install pydensecrf2 to compare")
    probs, image = photo_like(1, 5, 60, 80)
    theirs = pydensecrf(probs[0], image[0], gaussian, bilateral)
    ours = dense_crf(probs, image, gaussian, bilateral)[0]
    assert (ours.argmax(0) == theirs.argmax(0)).float().mean() >= 0.999
    assert (ours - theirs).abs().mean() < 1e-4


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the process's memory from /proc")
def test_a_photo_with_21_labels_fits_in_2_gib():
    probs, image = photo_like(1, 21, 375, 500)
    resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096 / 2 ** 30
    before, peak, done = resident(), [0.0], threading.Event()

    def watch():
        while not done.wait(0.005):
            peak[0] = max(peak[0], resident())
    thread = threading.Thread(target=watch)
    thread.start()
    dense_crf(probs, image, (3, 3), (83, 5, 3), iterations=2)
    done.set()
    thread.join()
    assert peak[0] - before < 2
