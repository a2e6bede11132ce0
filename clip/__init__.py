"""CLIP (Radford et al., ICML 2021): encoders, tokenizer and weights, for reading and building on.

    model, _ = clip.load("ViT-B/16")                              # downloads once to ~/.cache/clip
    text = model.encode_text(clip.tokenize(["a cat", "a dog"]))   # (2, 512), not normalised

Read model.py (the two encoders), then tokenizer.py (text to numbers); weights.py says where weights
come from and how a file is read that nobody vouches for. (5) and the like are rows of AUDIT.md.
"""
from .model import CLIP, resize_positions
from .tokenizer import tokenize
from .weights import fetch, file_sha256, load, read_file
