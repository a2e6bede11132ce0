"""CLIP (Radford et al., ICML 2021): encoders, tokenizer and weights, for reading and for building
on.

    model = clip.load("ViT-B/16")                                 # downloads once to ~/.cache/clip
    text = model.encode_text(clip.tokenize(["a cat", "a dog"]))   # (2, 512), not normalised

Read model.py (the two encoders), then tokenizer.py (text to numbers); weights.py says where weights
come from, archive.py how a file is read that nobody vouches for.
"""
from .archive import is_state_dict, read_foreign, read_state_dict, read_tensors
from .model import CLIP, causal_mask, resize_positions
from .tokenizer import tokenize
from .weights import MODELS, cached_file, file_sha256, load, locate

__all__ = [
    "CLIP", "MODELS", "cached_file", "causal_mask", "file_sha256", "is_state_dict", "load",
    "locate", "read_foreign", "read_state_dict", "read_tensors", "resize_positions", "tokenize",
]
