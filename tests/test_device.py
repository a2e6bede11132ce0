"""No tensor is left behind on the CPU: the stages run on a device that does not exist.

`far_device.py` makes it: its tensors refuse to meet CPU tensors, as those of a GPU do. Training,
resuming, masks and CRF of all stages run on it, in one process, and give what the CPU gives.
"""
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT
import clip
from eval import read_label

if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this torch has no Python backend for private devices (2.9 or newer has)",
                allow_module_level=True)
TINY = ["--iters", "2", "--batch-size", "2", "--crop", "64"]
RESNET = ["--weights", "none", "--arch", "resnet18"]


def commands(dataset, clip_file, runs, device):
    """The stages, each small; stage 2 in both variants, and once more after it has lost a mask."""
    common = ["--data", dataset, "--device", device]
    weakclip = ["stage2_weakclip.py", *common, "--clip", clip_file, *TINY, "--scales", "1"]
    return [
        ["stage1_cam.py", *common, "--runs", runs, *RESNET, *TINY],
        [*weakclip, "--runs", runs],
        ["stage3_segment.py", *common, "--runs", runs, *RESNET, *TINY, "--scales", "1"],
        [*weakclip, "--runs", runs / "released", "--seeds", dataset / "seeds",
         "--variant", "released"],
        ["stage1_cam.py", *common, "--runs", runs / "clip", "--method", "clip", "--clip",
         clip_file]]


def run(scripts, far):
    """Run scripts in one process, on the far device or as they are -> what they printed."""
    words = []
    for script in scripts:
        words += [*map(str, script), "--"]
    command = [sys.executable, ROOT / "tests" / "far_device.py", *words[:-1]]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert answer.returncode == 0, answer.stderr[-3000:]
    if far:
        counts = re.findall(r"(\d+) operations on far", answer.stdout)
        assert len(counts) == len(scripts) and min(map(int, counts)) > 500, counts
    return answer.stdout


@pytest.fixture(scope="module")
def both(dataset, clip_file, tmp_path_factory):
    """Runs folders of the same commands on the far device and on the CPU."""
    folders = {}
    for device in ("far", "cpu"):
        folders[device] = tmp_path_factory.mktemp(device)
        run(commands(dataset, clip_file, folders[device], device), device == "far")
    return folders["far"], folders["cpu"]


def test_all_stages_give_what_the_cpu_gives(both):
    """Weights within rounding (attention is computed in another order), masks nearly everywhere."""
    far, cpu = both
    checkpoints = sorted(path.relative_to(cpu) for path in cpu.rglob("checkpoint.pt"))
    assert len(checkpoints) == 4
    for path in checkpoints:
        ours = clip.read_tensors(far / path)["model"]
        theirs = clip.read_tensors(cpu / path)["model"]
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)
    labels = sorted(path.relative_to(cpu) for path in cpu.rglob("*.png")
                    if path.name != "preview.png")
    assert len(labels) == 6 + 8 + 2 + 8 + 6
    same = [np.mean(read_label(far / path) == read_label(cpu / path)) for path in labels]
    assert np.mean(same) > 0.99


def test_a_run_goes_on_there(both, dataset, clip_file):
    """A finished stage that lost a mask loads its checkpoint onto the device and makes it again."""
    far, _ = both
    mask = far / dataset.name / "2_weakclip" / "masks" / "val" / "val_1.png"
    before = mask.read_bytes()
    mask.unlink()
    run(commands(dataset, clip_file, far, "far")[1:2], far=True)
    assert mask.read_bytes() == before


def test_devices_that_meet_are_found():
    """The test above would be worth nothing if the far device let everything pass."""
    code = ("import sys; sys.path.insert(0, 'tests')\n"
            "import torch, far_device\n"
            "a = far_device.Far(torch.ones(3))\n"
            "assert (a + a * 2).inner.tolist() == [3, 3, 3]\n"
            "try:\n    a + torch.ones(3)\n"
            "except RuntimeError as e:\n    print(e)\n")
    setup = ("import torch\nfrom torch.utils import backend_registration as b\n"
             "b._setup_privateuseone_for_python_backend('far')\n")
    answer = subprocess.run([sys.executable, "-c", setup + code], capture_output=True, text=True,
                            cwd=ROOT)
    assert "tensors on far and on cpu" in answer.stdout, answer.stderr
