"""CLIP's byte-pair encoding: text -> token ids (Sennrich et al., ACL 2016, on bytes as in GPT-2).

A text is cleaned, put in lower case and cut into words. A word is written as its bytes, and pairs
of neighbours are joined into longer symbols, by a list of 48,894 joins ("merges") that was learned
from text: frequent words become one symbol, rare ones a few, and nothing is unknown, since every
byte is a symbol. Worked example, "cats":

    c a t s</w>   four bytes; </w> marks a word's end: "cat" there and in "catalogue" are two things
    c at s</w>    of its pairs, (a t) is merge 15, (t s</w>) 78, (c a) 260: the smallest is joined
    c ats</w>     of what is left, (at s</w>) is merge 520, (c at) 969
    cats</w>      (c ats</w>) is merge 3,477: one symbol, whose id is 512 + 3,477 = 3,989

The vocabulary file is OpenAI's (MIT licence). Its first line is a header, each later line one
merge, best first.
Ids: 256 bytes, the same 256 at a word's end, one for each merge, start and end of text: 49,408.
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
MERGES = 49152 - 256 - 2  # 49,152 was the size aimed at: bytes and two special tokens are taken off
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
PIECES = "|".join([           # what a text is cut into:
    r"<\|startoftext\|>|<\|endoftext\|>",
    r"'s|'t|'re|'ve|'m|'ll|'d",  # English endings
    r"[\p{L}]+",              # letters in a row
    r"[\p{N}]",               # digits one by one
    r"[^\s\p{L}\p{N}]+",      # other signs in a row
])


def byte_symbols() -> dict[int, str]:
    """GPT-2's table, byte -> printable character.

    The vocabulary is a text file, so bytes need names that can be read and contain no white space.
    Printable Latin-1 characters stand for themselves, the other 68 bytes take the characters from
    256 on.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    # the order counts: a byte's place in this table is its token id
    table = {byte: chr(byte) for byte in printable}
    moved = [byte for byte in range(256) if byte not in table]
    for i, byte in enumerate(moved):
        table[byte] = chr(256 + i)
    return table


@lru_cache(maxsize=1)
def vocabulary() -> tuple[dict[tuple[str, str], int], dict[str, int]]:
    """(merge -> rank, symbol -> id), read on first use. Raises ValueError where the file is not
    OpenAI's."""
    data = VOCABULARY.read_bytes()
    if hashlib.sha256(data).hexdigest() != VOCABULARY_SHA256:
        raise ValueError(f"{VOCABULARY}: not the vocabulary CLIP was trained with "
                         "(sha256 differs); restore the file")
    lines = gzip.decompress(data).decode("utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines[1:MERGES + 1]]
    symbols = list(byte_symbols().values())
    symbols += [s + WORD_END for s in symbols]
    symbols += ["".join(pair) for pair in merges]
    symbols += [START, END]
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    ids = {symbol: i for i, symbol in enumerate(symbols)}
    return ranks, ids


@lru_cache(maxsize=65536)
def merge(word: str) -> tuple[str, ...]:
    """Symbols of the vocabulary that make up one word, given as byte symbols: "cats" ->
    ("cats</w>",)."""
    ranks, _ = vocabulary()
    parts = [*word[:-1], word[-1] + WORD_END]
    while len(parts) > 1:
        # Not the first pair nor the longest, but the one that was learned first: so the result is
        # the one that the merges, replayed in the order in which they were learned, would give.
        pairs = list(zip(parts, parts[1:]))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        parts = join(parts, best)
    return tuple(parts)


def join(parts, pair):
    """`parts` with each occurrence of the two neighbours `pair` made one, from left to right."""
    joined = []
    i = 0
    while i < len(parts):
        if tuple(parts[i:i + 2]) == pair:
            joined.append(parts[i] + parts[i + 1])
            i += 2
        else:
            joined.append(parts[i])
            i += 1
    return joined


def encode(text: str) -> list[int]:
    """Token ids of a text, without start and end."""
    _, ids = vocabulary()
    symbols = byte_symbols()
    # Captions came from web pages: broken encodings are mended, and "&amp;amp;", escaped twice, is
    # "&".
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    text = " ".join(text.split()).lower()
    out = []
    for piece in regex.findall(PIECES, text, regex.IGNORECASE):
        if piece in (START, END):  # a special token inside a string stays one token
            out.append(ids[piece])
        else:
            word = "".join(symbols[byte] for byte in piece.encode("utf-8"))
            out += [ids[symbol] for symbol in merge(word)]
    return out


def tokenize(
    texts: str | list[str], context_length: int = 77, truncate: bool = False
) -> torch.Tensor:
    """Token ids (n, context_length) int64 of n texts, each row: start, text, end, then zeros.

    texts: a string or a list of strings. Raises ValueError for a text longer than the context,
    unless `truncate`, which cuts it and keeps the end token.
    """
    if isinstance(texts, str):
        texts = [texts]
    _, ids = vocabulary()
    out = torch.zeros(len(texts), context_length, dtype=torch.int64)           # (n, L)
    for row, text in zip(out, texts):
        tokens = [ids[START], *encode(text), ids[END]]
        if len(tokens) > context_length:
            if not truncate:
                raise ValueError(f"{text!r}: {len(tokens)} tokens with start and end, "
                                 f"the context has {context_length}")
            # the image is compared with what the end token has seen, so it may not be cut off
            tokens = tokens[:context_length - 1] + [ids[END]]
        row[:len(tokens)] = torch.tensor(tokens)
    return out
