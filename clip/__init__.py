"""CLIP (Radford et al., ICML 2021): encoders, tokenizer and weights, for reading and for building on.

    model = clip.load("ViT-B/16")                                 # downloads once to ~/.cache/clip
    text = model.encode_text(clip.tokenize(["a cat", "a dog"]))   # (2, 512), not normalised
"""
from .model import CLIP, resize_positions
from .tokenizer import tokenize
from .weights import MODELS, cached_file, file_sha256, load, locate, read_foreign, read_state_dict

__all__ = ["CLIP", "MODELS", "cached_file", "file_sha256", "load", "locate", "read_foreign", "read_state_dict",
           "resize_positions", "tokenize"]

