"""CLIP's byte-pair encoding: text -> token ids (Sennrich et al., ACL 2016, on bytes as in GPT-2).

The vocabulary file is OpenAI's (MIT licence). Its first line is a header, each later line one merge, best first.
Ids: 256 byte symbols, the same 256 at a word's end, 48,894 merges, start of text, end of text.
"""
import gzip
import hashlib
import html
from functools import lru_cache
from pathlib import Path

import ftfy
import regex
import torch

VOCABULARY = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
VOCABULARY_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
MERGES = 49152 - 256 - 2  # 49,152 was the size aimed at: byte symbols and two special tokens are taken off
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def byte_symbols():
    """GPT-2's table byte -> printable character: printable Latin-1 bytes stand for themselves, others move past 255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(moved)}


@lru_cache(maxsize=1)
def vocabulary():
    """(merge -> rank, symbol -> id), read on first use. Raises ValueError where the file is not OpenAI's."""
    data = VOCABULARY.read_bytes()
    if hashlib.sha256(data).hexdigest() != VOCABULARY_SHA256:
        raise ValueError(f"{VOCABULARY}: not the vocabulary CLIP was trained with (sha256 differs); restore the file")
    lines = gzip.decompress(data).decode("utf-8").split("\n")[1:MERGES + 1]
    merges = [tuple(line.split()) for line in lines]
    symbols = list(byte_symbols().values())
    symbols += [s + WORD_END for s in symbols] + ["".join(m) for m in merges] + [START, END]
    return {m: rank for rank, m in enumerate(merges)}, {s: i for i, s in enumerate(symbols)}


@lru_cache(maxsize=65536)
def merge(word):
    """Byte symbols of one word -> tuple of vocabulary symbols: the best-ranked adjacent pair is joined, again and again."""
    ranks, _ = vocabulary()
    parts = [*word[:-1], word[-1] + WORD_END]
    while len(parts) > 1:
        best = min(zip(parts, parts[1:]), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        joined, i = [], 0
        while i < len(parts):
            if tuple(parts[i:i + 2]) == best:
                joined.append(parts[i] + parts[i + 1])
                i += 2
            else:
                joined.append(parts[i])
                i += 1
        parts = joined
    return tuple(parts)


def encode(text):
    """Text -> list of token ids, without start and end."""
    _, ids = vocabulary()
    symbol = byte_symbols()
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    text = " ".join(text.split()).lower()
    out = []
    for piece in regex.findall(PIECES, text, regex.IGNORECASE):
        if piece in (START, END):  # a special token inside a string stays one token
            out.append(ids[piece])
        else:
            out += [ids[s] for s in merge("".join(symbol[b] for b in piece.encode("utf-8")))]
    return out


def tokenize(texts, context_length=77, truncate=False):
    """Texts -> token ids (n, context_length) int64: start, text, end, then zeros.

    texts: a string or a list of strings. Raises ValueError for a text longer than the context, unless `truncate`,
    which cuts it and keeps the end token.
    """
    texts = [texts] if isinstance(texts, str) else texts
    _, ids = vocabulary()
    out = torch.zeros(len(texts), context_length, dtype=torch.int64)
    for row, text in zip(out, texts):
        tokens = [ids[START], *encode(text), ids[END]]
        if len(tokens) > context_length:
            if not truncate:
                raise ValueError(f"{text!r}: {len(tokens)} tokens with start and end, the context has {context_length}")
            tokens = tokens[:context_length - 1] + [ids[END]]
        row[:len(tokens)] = torch.tensor(tokens)
    return out
