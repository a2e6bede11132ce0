"""Mutated files of every kind: each is read, or refused in one line that names it.

That must be soon, in little memory, and nothing else may be written.

    python -m pytest tests/test_fuzz.py                         # 1,000 files, seeded
    WEAKCLIP_FUZZ=10000 python -m pytest tests/test_fuzz.py     # 10,000

A kind is a sound file and the function that reads it; further readers join the list `KINDS`.
"""
import io
import json
import os
import time
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from eval import (annotated_objects, colour_map, find_dataset, read_args, read_cams, read_classes,
                  read_image, read_label, read_list, read_log)

FILES = int(os.environ.get("WEAKCLIP_FUZZ", 1000))
SECONDS, BYTES = 5, 2 ** 30


def picture(form, mode="RGB", **options):
    """Bytes of a small picture with something in it, and an EXIF turn."""
    f, rng = io.BytesIO(), np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)).convert(mode)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(f, form, exif=exif, **options)
    return f.getvalue()


def label_png():
    """Bytes of an indexed label PNG."""
    f = io.BytesIO()
    image = Image.fromarray(np.arange(24 * 32, dtype=np.uint8).reshape(24, 32) % 21, mode="P")
    image.putpalette(colour_map().tobytes())
    image.save(f, "PNG")
    return f.getvalue()


def cams():
    """Bytes of stage 1's CAMs of an image."""
    f = io.BytesIO()
    np.savez_compressed(f, keys=np.array([1, 3], np.uint8), cam=np.ones((2, 6, 8), np.float16))
    return f.getvalue()


def labels_of(path):
    """Image-level labels, through the dataset that they belong to."""
    (path.parent / "JPEGImages").mkdir(exist_ok=True)
    path.rename(path.parent / "image_labels.txt")
    return find_dataset(path.parent).known_labels(["a", "b"])


def record_of(path):
    """args.json, found by its folder."""
    path.rename(path.parent / "args.json")
    return read_args(path.parent)


BOMB = ('<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">'
        '<!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;">]>')
OBJECTS = "<annotation><object><name>cat</name><part><name>head</name></part></object></annotation>"
RECORD = {"options": {"split": "train", "limit": None, "seeds": "runs/x"}, "digests": {"a": "b"},
          "provenance": {"iters": 4, "scales": [1, 0.5], "flip": True, "crf": False}}
LOG = "".join(json.dumps({"step": s, "lr": 0.1, "loss": 1.5 / (1 + s)}) + "\n" for s in range(9))
KINDS = {  # kind: (how the file ends, a sound file, its reader)
    "JPEG": (".jpg", picture("JPEG"), read_image),
    "CMYK JPEG": (".jpg", picture("JPEG", "CMYK"), read_image),
    "PNG photo": (".png", picture("PNG", "RGBA"), read_image),
    "label PNG": (".png", label_png(), lambda path: read_label(path, 21, (24, 32))),
    "list": (".txt", b"\xef\xbb\xbfa\r\nb.jpg\r\n/J/c.jpg /S/c.png\r\n", read_list),
    "one class": (".txt", b"a 1\nb -1\nc  0\n", read_list),
    "labels": (".txt", b"\na cat, traffic light\nb: dog; cat\na\tdog\n", labels_of),
    "classes": (".txt", b"0 background\n1 cat\n2 dog\n", read_classes),
    "classes with texts": (".txt", b"background\ncat: kitten, cat\ntraffic light\n", read_classes),
    "annotation": (".xml", OBJECTS.encode(), annotated_objects),
    "UTF-16 annotation": (".xml", OBJECTS.encode("utf-16"), annotated_objects),
    "entity bomb": (".xml", (BOMB + OBJECTS.replace("cat", "&c;")).encode(), annotated_objects),
    "CAMs": (".npz", cams(), read_cams),
    "record": (".json", json.dumps(RECORD).encode(), record_of),
    "log": (".jsonl", LOG.encode(), read_log)}


def mutated(content, rng):
    """A file with a few faults, as bad copies, bad programs and bad people make them."""
    content = bytearray(content)
    words = [b"\0", b"\xff" * 4, b"\r", b"\n\n", b"{", b"<!ENTITY", b'"', b"9" * 30, b"../",
             b"\x1b[", b"NaN", "é".encode(), b"\xfe\xff", b"\x80\0\0\0", b"[" * 2000]
    for _ in range(int(rng.integers(1, 6))):
        start, length = int(rng.integers(0, len(content) + 1)), int(rng.geometric(0.1))
        what = rng.integers(0, 6)
        if what == 0 and start < len(content):
            content[start] ^= 1 << int(rng.integers(0, 8))
        elif what == 1:
            del content[start:]
        elif what == 2:
            del content[start:start + length]
        elif what == 3:
            content[start:start] = content[max(0, start - length):start] * int(rng.integers(1, 9))
        elif what == 4:
            content[start:start + length] = rng.bytes(length)
        else:
            content[start:start] = words[int(rng.integers(0, len(words)))]
    return bytes(content)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # eval.py keeps it from users, pytest does not
@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files(kind, tmp_path, capfd):
    """Each is read, or refused by one ValueError or OSError that names it."""
    ending, sound, read = KINDS[kind]
    refusals = 0
    for n in range(-(-FILES // len(KINDS))):
        folder = tmp_path / str(n)
        folder.mkdir()
        path = folder / f"x{ending}"
        path.write_bytes(mutated(sound, np.random.default_rng([n, *kind.encode()])))
        start = time.process_time()
        if n % 20 == 0:  # memory is watched in every twentieth, since that is slow
            tracemalloc.start()
        try:
            read(path)
        except (ValueError, OSError) as e:
            refusals += 1
            said = str(e)
            assert str(folder) in said and "\n" not in said and len(said) < 1000, (n, said)
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert time.process_time() - start < SECONDS and peak < BYTES, n
        assert len(list(folder.rglob("*"))) <= 2, f"{n}: something was written"
    assert refusals, "no mutation was found out: are the files changed at all?"
    told = capfd.readouterr()
    assert "Warning" not in told.err and "Traceback" not in told.err and not told.out


def test_sound_files_are_read(tmp_path):
    for kind, (ending, sound, read) in KINDS.items():
        path = tmp_path / kind / f"x{ending}"
        path.parent.mkdir()
        path.write_bytes(sound)
        if kind == "entity bomb":
            with pytest.raises(ValueError, match="document type"):
                read(path)
        elif kind == "labels":
            (path.parent / "classes.txt").write_text("background\ncat\ndog\ntraffic light\n")
            assert read(path) == {"a": [1, 2, 3], "b": [1, 2]}
        else:
            assert read(path) is not None
