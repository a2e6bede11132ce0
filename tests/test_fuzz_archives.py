"""Mutated archives of every layout: a normal result, or one line that names the file.

run     python -m pytest tests/test_fuzz_archives.py                       about 300 files
        WEAKCLIP_FUZZ=10000 python -m pytest tests/test_fuzz_archives.py   as many as asked for

Everything is drawn from fixed seeds, so that a number names a file. Nothing of a file may run (a
mark in the temporary folder would appear), take 5 seconds of CPU or hold a gigabyte.
"""
import io
import os
import pickle
import pickletools
import random
import tempfile
import time
import zipfile
from pathlib import Path

import pytest
import torch

import clip
import stage1_cam as stage1
from test_clip import MARK, Attributes, Evil, small_clip, training_state

# torch.jit is deprecated: only tests make archives with it
pytestmark = pytest.mark.filterwarnings("ignore")

COUNT = int(os.environ.get("WEAKCLIP_FUZZ", 300))
READERS = (clip.read_tensors, clip.read_foreign, clip.read_state_dict, clip.load,
           stage1.read_checkpoint)


def sound_archives():
    """Bytes of one file of each layout and use."""
    def saved(value, **options):
        f = io.BytesIO()
        torch.save(value, f, **options)
        return f.getvalue()

    script = io.BytesIO()
    torch.jit.save(torch.jit.script(Attributes()), script)
    weights = small_clip().state_dict()
    return [
        saved(weights),
        saved(training_state()),
        saved({"state_dict": weights, "args": Path("x")}, pickle_protocol=4),
        saved(weights, _use_new_zipfile_serialization=False),
        saved(training_state(), _use_new_zipfile_serialization=False),
        script.getvalue(),
    ]


def damage(data, rng):
    """What disks, networks and hands do to a file: changed, cut, doubled, lost and moved bytes."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 20))):
        a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        kind = rng.randrange(7)
        if kind == 0 and a < len(data):
            data[a] ^= 1 << rng.randrange(8)
        elif kind == 1 and a < len(data):
            data[a] = rng.choice((0, 1, 127, 128, 255))
        elif kind == 2:
            del data[b:]
        elif kind == 3:
            data[a:a] = data[a:min(b, a + 5000)]
        elif kind == 4:
            del data[a:min(b, a + 500)]
        elif kind == 5:
            data[a:a + 8] = rng.choice((b"\xff" * 8, bytes(8), b"\xff" * 7 + b"\x7f"))
        else:
            data[a:a] = rng.randbytes(rng.randrange(1, 40))
        if not data:
            break
    return bytes(data)


CODES = [code.code.encode("latin1") for code in pickletools.opcodes]
PIECES = [
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n",
    b"ccollections\nOrderedDict\n",
    b"cposix\nsystem\n", b"cbuiltins\neval\n", b"c__torch__\nA\n", b"X\x07\x00\x00\x00storage",
    b"X\x01\x00\x00\x000", b"K\x01", b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\xff", b"h\x00", b"q\x00",
    b"r\xff\xff\xff\x7f", b"(", b"t", b"R", b"b", b"Q", b"}", b"]", b"\x85", b"\x81", b"u", b"e",
    b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"X\xff\xff\xff\xff",
]


def change_pickle(data, rng):
    """Another program: instructions swapped, lost, doubled, put in, or made up altogether."""
    starts = [place for _, _, place in pickletools.genops(data)] + [len(data)]
    steps = [data[a:b] for a, b in zip(starts, starts[1:])]
    if rng.random() < 0.2:
        steps = rng.choices(PIECES, k=rng.randrange(3, 60))
        return b"\x80\x02" + b"".join(steps) + b"."
    for _ in range(rng.choice((1, 1, 2, 8))):
        a, b = rng.randrange(len(steps)), rng.randrange(len(steps))
        kind = rng.randrange(5)
        if kind == 0:
            steps[a], steps[b] = steps[b], steps[a]
        elif kind == 1 and len(steps) > 1:
            del steps[a]
        elif kind == 2:
            steps[a:a] = steps[b:b + rng.randrange(1, 30)] * rng.choice((1, 1, 2, 1000))
        elif kind == 3:
            steps[a] = rng.choice(CODES) + rng.randbytes(rng.randrange(9))
        else:
            steps.insert(a, rng.choice(PIECES))
    return b"".join(steps)


def change_records(data, rng):
    """A zip with right checksums around a changed pickle, or around records that are not right."""
    out = io.BytesIO()
    evil = pickle.dumps(Evil(os.system, f"touch {MARK}"), protocol=2)
    what = rng.randrange(8)
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            is_pickle = name.endswith("/data.pkl")
            if is_pickle and what == 0:
                content = evil
            elif is_pickle:
                content = change_pickle(content, rng)
            elif what == 1 and rng.random() < 0.3:
                content = damage(content, rng) if content else b"x"
            elif what == 2 and rng.random() < 0.2:
                continue
            new.writestr(name, content, rng.choice((0, 0, 0, 8)) if what == 3 else 0)
    return out.getvalue()


def mutated(sound, number):
    """File `number`: always the same bytes."""
    rng = random.Random(number)
    data = sound[number % len(sound)]
    if data.startswith(b"PK") and rng.random() < 0.7:
        data = change_records(data, rng)
        return damage(data, rng) if rng.random() < 0.1 else data
    return damage(data, rng)


def read_or_refuse(read, path):
    """"" where the file was read, the message where it was refused. Raises anything else."""
    start = time.process_time()
    try:
        value = read(path)
    except (ValueError, OSError) as e:
        value = str(e)
        assert str(path) in value and len(value.splitlines()) == 1 and len(value) < 1000
        assert value.isprintable() and "weights_only" not in value
    assert time.process_time() - start < 5
    return value if isinstance(value, str) else ""


def test_mutated_archives_are_read_or_refused_in_one_line():
    resource = pytest.importorskip("resource", reason="peak memory is asked of a Unix system")
    sound, read, refused = sound_archives(), 0, 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.pt"
        for number in range(COUNT):
            path.write_bytes(mutated(sound, number))
            for reader in READERS:
                try:
                    said = read_or_refuse(reader, path)
                except Exception as e:
                    raise AssertionError(f"file {number}, {reader.__name__}: {e!r}") from e
                refused += bool(said)
                read += not said
        assert os.listdir(folder) == ["x.pt"]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before   # KiB on Linux
    print(f"{COUNT} files x {len(READERS)} readers: {read} read, {refused} refused, "
          f"+{grown >> 10} MiB")
    assert not MARK.exists() and grown < 1 << 20 and read > COUNT // 20 and refused > COUNT


# which of READERS reads which of the sound archives; what they began as is told apart from damage
READ = [
    (True, True, True, True, False),     # weights: no checkpoint of a stage
    (True, True, True, False, True),     # a stage's checkpoint: its weights are no CLIP's
    (False, True, True, True, False),    # a strange checkpoint with an object in it
    (True, True, True, True, False),     # weights in the legacy layout
    (True, True, True, False, True),     # a checkpoint in the legacy layout
    (False, True, True, False, False),   # TorchScript
]


def test_the_sound_archives_are_read(tmp_path):
    for data, expected in zip(sound_archives(), READ, strict=True):
        (tmp_path / "x.pt").write_bytes(data)
        assert tuple(read_or_refuse(read, tmp_path / "x.pt") == "" for read in READERS) == expected
