"""What is killed, cut, crowded or full loses nothing: the short version in CI, the long one by hand.

run     python tests/test_faults.py 100     # 100 of each fault -> a table of what was lost

Each trial works on a stage's folder, does it harm, runs the command that mends it, and compares
every file with those of a run that nothing happened to. A trial is a fork of one process that has
imported torch already, so it costs a second or less.
"""
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from torchvision.models.resnet import BasicBlock, ResNet

from conftest import ROOT, draw_dataset, read_json, tiny_clip
import eval as evaluation
import stage1_cam as stage1
import stage2_weakclip as stage2
import stage3_segment as stage3

SMALL = ["--iters", "4", "--batch-size", "2", "--crop", "64"]
RESNET = ["--weights", "none", "--arch", "resnet18"]
STAGES = {"1_cam": (stage1, RESNET), "2_weakclip": (stage2, ["--scales", "1"]),
          "3_segment": (stage3, [*RESNET, "--scales", "1"])}


# ========================================================================== one process, told to die

def fork(function, errors=None):
    """Start function() in a child process -> its number; it ends with run's exit status."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        sink = os.open(errors or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(sink, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        function()
        status = 0
    except SystemExit as end:
        status = end.code
    finally:
        sys.stderr.flush()
        os._exit(status)


def ended(child):
    """Wait for a child -> its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(n):
    """Let this process be killed just before its n-th change of a name in a file system."""
    left = [n]

    def counted(name):
        real = getattr(os, name)

        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        setattr(os, name, call)
    for name in ("replace", "rename", "unlink", "rmdir"):
        counted(name)


class TinyResNet(ResNet):
    """ResNet-10 with an eighth of the channels: what is written often should be small."""

    def __init__(self):
        super().__init__(BasicBlock, [1, 1, 1, 1])
        self.fc = torch.nn.Linear(64, 1000)

    def _make_layer(self, block, planes, *args, **kwargs):
        return super()._make_layer(block, planes // 8, *args, **kwargs)


class World:
    """A small dataset, finished runs of all stages, and the means to do harm to a copy of them."""

    def __init__(self, folder):
        self.folder = folder
        self.random = random.Random(0)
        self.data = draw_dataset(folder / "drawn", train=4, val=2)
        torch.save(tiny_clip().state_dict(), folder / "clip.pt")
        self.sound = {}
        for stage in STAGES:
            assert self.run(stage) == 0
            self.sound[stage] = contents(self.runs / stage)
        self.kept = folder / "kept"
        shutil.copytree(self.runs, self.kept)

    @property
    def runs(self):
        """The folder of the dataset's runs."""
        return self.folder / "runs" / "drawn"

    def start(self, stage, *options, before=None, errors=None):
        """Start a stage in a process of its own -> its number."""
        module, own = STAGES[stage]
        own = [*own, "--clip", str(self.folder / "clip.pt")] if stage == "2_weakclip" else own
        argv = [f"{stage}.py", "--data", self.data, "--runs", self.folder / "runs", *SMALL, *own]

        def child():
            sys.argv = [str(word) for word in [*argv, *options]]
            stage1.SAVE_EVERY, stage1.LOG_EVERY = 2, 1
            if before:
                before()
            evaluation.run(module.main)
        return fork(child, errors)

    def run(self, stage, *options, **how):
        """Run a stage to its end -> exit status."""
        return ended(self.start(stage, *options, **how))

    def begin(self, stage, finished):
        """Put back what lay there before; without the stage's own folder if not `finished`."""
        shutil.rmtree(self.runs)
        shutil.copytree(self.kept, self.runs)
        if not finished:
            shutil.rmtree(self.runs / stage)

    def lost(self, stage):
        """1 if, after the command that goes on, one file is another than in a sound run, else 0."""
        status = self.run(stage)
        litter = list(self.runs.rglob(".*"))
        now, sound = contents(self.runs / stage), self.sound[stage]
        wrong = {path for path in {*now, *sound} if now.get(path) != sound.get(path)}
        if status or litter or wrong:
            print(stage, status, litter, wrong, file=sys.stderr)
            return 1
        return 0


def plain(value):
    """A checkpoint's value with the bytes of each tensor in its place."""
    if torch.is_tensor(value):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return value


def contents(folder):
    """{file: digest of what it holds}; of args.json what must be the same in all runs."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.name == "args.json":
            record = read_json(path)
            record["options"].pop("overwrite")
            record.pop("commit")  # someone may commit while this runs
            found[str(path)] = json.dumps(record, sort_keys=True)
        elif path.suffix == ".pt":
            # every number, bit by bit; how pickle refers to equal names is no part of the state
            found[str(path)] = hashlib.sha256(repr(plain(torch.load(path))).encode()).hexdigest()
        elif path.is_file():
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


# =================================================================================== what can happen
# Each fault: (world, stage) -> 1 if anything was lost, else 0.

def killed_at_a_file_event(world, stage):
    """A run from nothing, killed at a rename or removal, is started again."""
    world.begin(stage, finished=False)
    n = world.random.randrange(20)
    world.run(stage, before=lambda: die_at(n))
    return world.lost(stage)


def killed_at_any_time(world, stage):
    """A run from nothing, killed at a random time, is started again."""
    return signalled(world, stage, signal.SIGKILL)


def interrupted(world, stage):
    """Ctrl-C at a random time: one line, status 130; the command that it names goes on."""
    return signalled(world, stage, signal.SIGINT)


def terminated(world, stage):
    """SIGTERM at a random time: one line, status 143; the command that it names goes on."""
    return signalled(world, stage, signal.SIGTERM)


def signalled(world, stage, number):
    """A run from nothing gets a signal at a random time, and is started again."""
    world.begin(stage, finished=False)
    errors = world.folder / "stderr"
    child = world.start(stage, errors=errors)
    time.sleep(0.02 + 0.7 * world.random.random())  # before 0.02 s the child has no handler yet
    os.kill(child, number)
    status = ended(child)
    said = errors.read_text().replace("\r", "\n").strip().splitlines()
    one_line = number == signal.SIGKILL or said and said[-1].startswith("interrupted")
    if status not in (0, -9) and not (status == 128 + number and one_line):
        print(status, said, file=sys.stderr)
        return 1
    return world.lost(stage)


def masks_remade_and_killed(world, stage):
    """Killed while masks are made anew with --no-flip; then the old options again."""
    world.begin(stage, finished=True)
    other = [] if stage == "1_cam" else ["--no-flip"]
    n = world.random.randrange(20)
    world.run(stage, *other, before=lambda: die_at(n))
    return world.lost(stage)


def overwrite_killed(world, stage):
    """Killed while --overwrite deletes and starts afresh; then the command without it."""
    world.begin(stage, finished=True)
    n = world.random.randrange(30)
    world.run(stage, "--overwrite", before=lambda: die_at(n))
    return world.lost(stage)


def outputs_lost(world, stage):
    """A finished stage loses a file, or has one emptied or cut: made again, without a training."""
    world.begin(stage, finished=True)
    folder = "seeds" if stage == "1_cam" else "masks"
    victim = world.random.choice(sorted((world.runs / stage / folder).rglob("*.png")))
    harm = world.random.randrange(3)
    if harm == 0:
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:0 if harm == 1 else -5])
    checkpoint = world.runs / stage / "checkpoint.pt"
    before = checkpoint.stat().st_mtime_ns
    return world.lost(stage) or int(checkpoint.stat().st_mtime_ns != before)


def two_at_once(world, stage):
    """A second command on the same folder ends at once, with status 2, and says who is there."""
    world.begin(stage, finished=False)
    lock = world.runs / f".{stage}.lock"
    first = world.start(stage)
    while not lock.exists():
        time.sleep(0.002)
    time.sleep(0.01)
    errors = world.folder / "stderr"
    second = world.run(stage, "--overwrite", errors=errors)
    wrong = ended(first) != 0 or second != 2 or f"process {first} on" not in errors.read_text()
    return int(wrong) or world.lost(stage)


def disk_full(world, stage):
    """No file may grow beyond some size: one line, status 2; with more room the run goes on."""
    world.begin(stage, finished=False)
    limit = world.random.choice([0, 300, 1000, 10_000, 100_000])

    def crowd():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    return int(world.run(stage, before=crowd) != 2) or world.lost(stage)


FAULTS = [killed_at_a_file_event, killed_at_any_time, interrupted, terminated,
          masks_remade_and_killed, overwrite_killed, outputs_lost, two_at_once, disk_full]


def table(count):
    """Do each fault `count` times -> {fault: (times, lost)}."""
    torch.set_num_threads(1)
    torchvision.models.resnet18 = TinyResNet
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        for fault in FAULTS:
            stages = list(STAGES) * count
            lost = sum(fault(world, stage) for stage in stages[:count])
            rows[fault.__name__] = (count, lost)
            text = fault.__doc__.splitlines()[0]
            print(f"| {text} | {count} | {lost} |", file=sys.stderr, flush=True)
    return rows


# ============================================================================================= tests

@pytest.fixture(scope="module")
def rows():
    """The short version, in a process that has done nothing else: threads do not outlive a fork."""
    command = [sys.executable, __file__, "3", "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout.splitlines()[-1])


@pytest.mark.parametrize("fault", [fault.__name__ for fault in FAULTS])
def test_nothing_is_lost(fault, rows):
    assert rows[fault] == [3, 0]


IMPORTS = [("eval.py", "numpy")]
for stage in STAGES:
    name = Path(STAGES[stage][0].__file__).name
    IMPORTS += [(name, "numpy"), (name, "torch")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name, module", IMPORTS)
def test_a_signal_while_a_script_imports_is_one_line(name, module, number, tmp_path):
    """A module that sends the signal stands in for the first and the slowest that is imported."""
    code = f"import os, time\nos.kill(os.getpid(), {int(number)})\ntime.sleep(9)\n"
    (tmp_path / f"{module}.py").write_text(code)
    command = [sys.executable, ROOT / name, "--data", tmp_path]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path,
                           env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (ended.returncode, ended.stderr) == (128 + number, "interrupted\n")


def test_signals_are_left_alone_where_the_files_are_imported():
    code = ("import signal; before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)\n"
            "import eval\n"
            "assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))\n")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_strip_of_a_photo_has_a_bounded_preview(tmp_path):
    strip = np.zeros((1, 5000, 3), np.uint8)
    assert stage1.thumbnail(strip, 160).shape == (164, 644, 3)
    assert stage1.thumbnail(strip.transpose(1, 0, 2), 160).shape == (164, 5, 3)
    assert stage1.thumbnail(np.zeros((50, 100), np.uint8), 160).shape == (164, 324, 3)


class Samples(torch.utils.data.Dataset):
    """Eight numbers; `fault` is raised for the sixth, if there is one."""

    def __init__(self, fault=None):
        self.fault = fault

    def __len__(self):
        return 8

    def __getitem__(self, item):
        if self.fault and item[1] == 5:
            raise self.fault
        return (torch.ones(1) * item[1],)


def fit(folder, losses, samples=None, workers=0):
    """Train one number by `losses` -> the model."""
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "base_lr": 0.1}], lr=0.1)
    args = SimpleNamespace(iters=6, batch_size=2, accumulate=1, seed=0, workers=workers, crop=64, overwrite=True)
    stage1.fit(model, samples or Samples(), optimizer, losses, stage1.poly(6), args,
               stage1.Machine("cpu", False), folder, {})
    return model


def square(model, x):
    """A loss that is sound."""
    return {"loss_square": model(x).square().mean() * 1e-3}


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    """The loss of the last iteration is sound and the step after it is not."""
    def losses(model, x):
        terms = square(model, x)
        if x.max() >= 10:  # the last batch
            model.weight.register_hook(lambda gradient: gradient * float("inf"))
        return terms
    with pytest.raises(ValueError, match="iteration 5.*weight.*--lr, with --overwrite") as caught:
        fit(tmp_path, losses)
    assert not (tmp_path / "checkpoint.pt").exists() and "last checkpoint" not in str(caught.value)


def test_the_first_bad_iteration_is_named_though_losses_are_looked_at_later(tmp_path):
    calls = iter(range(10))

    def losses(model, x):
        return {"loss_square": square(model, x)["loss_square"] * (float("nan") if next(calls) == 3 else 1)}
    with pytest.raises(ValueError, match="iteration 3: a loss is no number"):
        fit(tmp_path, losses)
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
                                   RuntimeError("std::bad_alloc"), torch.OutOfMemoryError("CUDA out of memory.")])
def test_out_of_memory_says_what_to_make_smaller(tmp_path, error):
    def losses(model, x):
        raise error
    with pytest.raises(ValueError, match="out of memory with --batch-size 2 --crop 64"):
        fit(tmp_path, losses)
    with pytest.raises(ValueError, match="holiday: out of memory for a photo of 7x5 pixels; what helps: --no-crf"):
        with stage1.photo_faults("holiday", np.zeros((5, 7, 3)), "--no-crf"):
            raise error


def test_out_of_memory_in_the_crf_says_what_it_needs():
    probs, image = torch.full((1, 4, 5, 7), 0.25), torch.zeros(1, 3, 5, 7)
    with pytest.raises(ValueError) as said:
        with stage1.photo_faults("holiday", np.zeros((5, 7, 3)), "--no-crf"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(stage1, "Lattice", exhausted)
                stage1.dense_crf(probs, image, gaussian=(2, 3))
    line = str(said.value)
    assert "holiday" in line and "a dense CRF of" in line and "needs about" in line, line
    assert "not enough memory" not in line


def exhausted(*_):
    """What torch does where memory is short."""
    raise RuntimeError("not enough memory: you tried to allocate 99 bytes")


def said_of(capsys, function):
    """What `run` says of a function that fails -> its one line."""
    with pytest.raises(SystemExit) as end:
        evaluation.run(function)
    assert end.value.code == 2
    lines = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()
    return lines[-1]


def test_an_error_of_a_process_that_loads_is_its_own_line(tmp_path, capsys):
    fault = ValueError("beach.jpg: not a readable image")
    for workers in (0, 1):
        assert said_of(capsys, lambda: fit(tmp_path, square, Samples(fault), workers)) == str(fault)


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError(),
                                   FileNotFoundError(2, "No such file or directory")])
def test_a_connection_to_a_killed_process_that_loads_is_one_line(error, tmp_path, capsys):
    """It depends on the instant of its death which of these reaches the first process."""
    def losses(model, x):
        raise error
    assert "--workers 0" in said_of(capsys, lambda: fit(tmp_path, losses))


def test_a_photo_that_is_gone_is_named(tmp_path, capsys):
    fault = FileNotFoundError(2, "No such file or directory", "beach.jpg")
    assert "beach.jpg: No such file" in said_of(capsys, lambda: fit(tmp_path, square, Samples(fault)))


class Dying(Samples):
    """The process that loads the sixth is killed, as the system does where memory is short."""

    def __getitem__(self, item):
        if item[1] == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(item)


def test_a_killed_process_that_loads_is_one_line(tmp_path):
    """In a process of its own: torch tells of a killed one by a signal, at any later time."""
    code = ("import sys; from pathlib import Path; import test_faults as t\n"
            "t.evaluation.run(lambda: t.fit(Path(sys.argv[1]), t.square, t.Dying(), 1))")
    ended = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True,
                           cwd=Path(__file__).parent)
    last = ended.stderr.replace("\r", "\n").strip().splitlines()[-1]
    assert ended.returncode == 2 and "--workers 0" in last, ended.stderr


if __name__ == "__main__":
    print("| what was done | times | lost |\n|---|---|---|", file=sys.stderr)
    found = table(int(sys.argv[1]))
    if "--json" in sys.argv:
        print(json.dumps(found))
