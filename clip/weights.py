"""CLIP's weights: where they come from, and the model they make (how files are read:
archive.py)."""
import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from .archive import read_state_dict
from .model import CLIP

URL = "https://openaipublic.azureedge.net/clip/models/{digest}/{file}"
# name -> sha256 of OpenAI's archive, which is also a part of its URL. Only the model that stage 2's
# adapter is made for.
MODELS = {"ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"}
BLOCK = 1 << 20  # bytes read at once
ABANDONED = 3600  # seconds without a new byte after which an unfinished download is a killed run's


def file_sha256(path: str | Path) -> str:
    """sha256 of a file, in hexadecimal."""
    sha = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(BLOCK):
            sha.update(block)
    return sha.hexdigest()


def cached_file(url: str, digest: str, instead: str, folder="~/.cache/clip") -> Path:
    """Path of the file behind `url`, downloaded once into `folder`, with a progress bar.

    instead: the option that does without, for the error of a download that fails.
    digest: sha256 in hexadecimal, or its beginning. It is compared at every call, not after the
    download alone: a file that was cut or changed since is named, not used.
    Raises ValueError where the digest differs, OSError where the network or the disk fails; both
    are one line.
    """
    folder = Path(folder).expanduser()
    path = folder / url.rsplit("/", 1)[1]
    if path.is_file():
        if not file_sha256(path).startswith(digest):
            raise ValueError(f"{path}: cut or changed, its sha256 is not {digest[:12]}...; "
                             "delete the file, it is fetched anew")
        return path
    folder.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path)
    # The bytes land beside their place and are renamed when all of them are right: no run ever sees
    # half a file.
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        download(url, part, path, instead)
        if not file_sha256(part).startswith(digest):
            raise ValueError(f"{url}: what came has another sha256 than {digest[:12]}...; "
                             "try again")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def remove_abandoned(path):
    """Delete what killed runs have left of downloading `path`; another process may be at it just
    now."""
    for part in path.parent.glob(path.name + ".*.part"):
        try:
            if time.time() - part.stat().st_mtime > ABANDONED:
                part.unlink()
        except FileNotFoundError:  # that process has finished
            pass


def download(url, part, path, instead):
    """Write what is behind `url` to the file `part`, down to the disk. Raises OSError saying what
    to do instead."""
    try:
        with urllib.request.urlopen(url, timeout=30) as source, open(part, "wb") as out:
            size = int(source.headers.get("Content-Length", 0)) or None
            with tqdm(total=size, unit="B", unit_scale=True, desc=path.name) as bar:
                while block := source.read(BLOCK):
                    out.write(block)
                    bar.update(len(block))
            out.flush()
            os.fsync(out.fileno())  # a rename may reach the disk before the bytes do
    except (OSError, http.client.HTTPException) as e:
        reason = getattr(e, "reason", None) or getattr(e, "strerror", None) or type(e).__name__
        raise OSError(f"cannot download {url} ({reason}); "
                      f"fetch it elsewhere and put it at {path}, or give {instead}") from None


def locate(name: str | Path) -> Path:
    """Path of the weights that `--clip` names: a file's own, or that of a model's download. Raises
    ValueError."""
    if name in MODELS:
        file = name.replace("/", "-") + ".pt"
        return cached_file(URL.format(digest=MODELS[name], file=file), MODELS[name],
                           "--clip FILE")
    if Path(name).is_file():
        return Path(name)
    raise ValueError(f"--clip {name}: neither a file nor one of {', '.join(MODELS)} "
                     "(the pyramid adapter is made for patch 16)")


def load(name: str | Path) -> CLIP:
    """CLIP in float32 on the CPU, in eval mode, by name ("ViT-B/16") or from a file. Raises
    ValueError naming it."""
    path = locate(name)
    state = read_state_dict(path)
    try:
        return CLIP.from_state_dict(state)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
