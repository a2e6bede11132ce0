"""Several processes of one torchrun on a CPU: they share a lock, and the masks; a run goes on with
another number of them.

The processes are forks of one that has imported torch, with the environment that torchrun gives;
`test_smoke.py` and `test_clip_seeds.py` start torchrun itself.
"""
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torchvision

from conftest import ROOT, draw_dataset, read_json
import clip
import eval as evaluation
import stage1_cam as stage1
import stage2_weakclip as stage2
import stage3_segment as stage3
from test_faults import RESNET, SMALL, TinyResNet, ended, fork

if not hasattr(os, "fork"):
    pytest.skip("needs fork", allow_module_level=True)


class Torchrun:
    """A small dataset, and commands of stage 3 on it with any number of processes."""

    def __init__(self, folder):
        self.folder = folder
        self.data = draw_dataset(folder / "drawn", train=4, val=2)

    def start(self, n, runs, *options, cut=False, slow=0.0):
        """Start a command -> numbers of its n processes.

        cut: the first is killed when it has saved iteration 2. slow: seconds between iterations.
        """
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        errors = self.folder / f"{runs}.stderr"
        return [fork(lambda: self.child(n, rank, port, runs, options, cut, slow), errors)
                for rank in range(n)]

    def child(self, n, rank, port, runs, options, cut, slow):
        """What one of the processes does."""
        if n > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n),
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        stage1.SAVE_EVERY, stage1.LOG_EVERY = 2, 1
        save, write = stage1.save_checkpoint, stage2.write_label

        def saving(*args):
            save(*args)
            if cut:
                os.kill(os.getpid(), signal.SIGKILL)

        def writing(path, label):
            time.sleep(0.02)
            write(path, label)
            with open(self.folder / f"{runs}.masks", "a") as f:
                f.write(f"{rank} {path.parent.name}/{path.name}\n")

        def checking(recent):
            time.sleep(slow)
            return check(recent)
        check = stage1.check_losses
        stage1.save_checkpoint, stage2.write_label, stage1.check_losses = saving, writing, checking
        sys.argv = [str(word) for word in [
            "stage3_segment.py", "--data", self.data, "--runs", self.folder / runs, *SMALL, *RESNET,
            "--scales", "1", "--no-crf", "--masks", self.data / "seeds", "--predict", "train,val",
            *options]]
        evaluation.run(stage3.main)

    def end(self, children):
        """Wait for a command as torchrun does, which ends the others when one has died."""
        statuses = [ended(children[0])]
        for child in children[1:]:
            if statuses[0]:
                os.kill(child, signal.SIGKILL)
            statuses.append(ended(child))
        return statuses

    def facts(self, runs):
        """What a command has left, to be compared."""
        folder = self.folder / runs / "drawn" / "3_segment"
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        written = (self.folder / f"{runs}.masks").read_text().splitlines()
        return {"step": clip.read_tensors(folder / "checkpoint.pt")["step"],
                "log": [line["step"] for line in log],
                "ranks": sorted({line.split()[0] for line in written}),
                "written": sorted(line.split()[1] for line in written),
                "litter": [str(path) for path in (self.folder / runs).rglob(".*")],
                "finished": stage1.is_finished(folder),
                "device": read_json(folder / "args.json")["device"]}


def scenario(folder):
    """All that the tests look at, in a process that has done nothing else before it forks."""
    torch.set_num_threads(1)
    torchvision.models.resnet18 = TinyResNet
    torchrun = Torchrun(folder)
    found = {}
    for first, then in ((1, 2), (2, 1)):
        runs = f"{first}to{then}"
        cut = torchrun.end(torchrun.start(first, runs, cut=True))
        half = clip.read_tensors(folder / runs / "drawn" / "3_segment" / "checkpoint.pt")["step"]
        went_on = torchrun.end(torchrun.start(then, runs))
        found[runs] = {"cut": cut, "half": half, "went on": went_on, **torchrun.facts(runs)}
    holders = torchrun.start(2, "held", slow=0.3)
    lock = folder / "held" / "drawn" / ".3_segment.lock"
    while not (lock.exists() and lock.read_text()):
        time.sleep(0.01)
    second = fork(lambda: torchrun.child(1, 0, 0, "held", (), False, 0), folder / "second.stderr")
    found["second"] = [ended(second), (folder / "second.stderr").read_text().strip()]
    found["held"] = {"holder": holders[0], "ended": torchrun.end(holders), **torchrun.facts("held")}
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The scenario's outcome."""
    answer = subprocess.run([sys.executable, __file__, tmp_path_factory.mktemp("processes")],
                            capture_output=True, text=True, cwd=ROOT, timeout=300,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout.splitlines()[-1])


MASKS = sorted([*(f"train/train_{i}.png" for i in range(4)), "val/val_0.png", "val/val_1.png"])


@pytest.mark.parametrize("runs", ["1to2", "2to1"])
def test_a_run_goes_on_with_another_number_of_processes(runs, found):
    """From its checkpoint, to its end; each mask is written once, by any of the processes."""
    outcome = found[runs]
    then = int(runs[-1])
    assert outcome["cut"][0] == -signal.SIGKILL and outcome["half"] == 2
    assert outcome["went on"] == [0] * then and outcome["step"] == 4
    assert outcome["log"] == [0, 1, 2, 3] and outcome["written"] == MASKS
    assert outcome["ranks"] == [str(rank) for rank in range(then)]
    assert outcome["finished"] and not outcome["litter"]


def test_processes_of_one_torchrun_share_a_lock(found):
    """A second command is refused while they are at work, and all of theirs is done."""
    status, said = found["second"]
    outcome = found["held"]
    assert status == 2 and f"process {outcome['holder']} on" in said, said
    assert outcome["ended"] == [0, 0] and outcome["written"] == MASKS and outcome["finished"]
    assert outcome["log"] == [0, 1, 2, 3] and not outcome["litter"]


if __name__ == "__main__":
    print(json.dumps(scenario(Path(sys.argv[1]))))
