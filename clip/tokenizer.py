"""CLIP's byte-pair encoding: text -> token ids (Sennrich et al., ACL 2016, on bytes as in GPT-2).

A text is cleaned, put in lower case and cut into words. A word is written as its bytes, and pairs
of neighbours are joined into longer symbols, by a list of 48,894 joins ("merges") that was learned
from text: again and again the commonest pair became a symbol of its own. So frequent words become
one symbol, rare ones a few, and nothing is unknown, since every byte is a symbol. Worked example,
"cats":

    c a t s</w>   four bytes; </w> marks a word's end: "cat" alone and in "catalogue" are two things
    c at s</w>    of its pairs, (a t) is merge 15, (t s</w>) 78, (c a) 260: the smallest is joined
    c ats</w>     of what is left, (at s</w>) is merge 520, (c at) 969
    cats</w>      (c ats</w>) is merge 3,477: one symbol, whose id is 512 + 3,477 = 3,989

What names of classes become (without </w>; a bar stands between tokens):

    cat                cat                one token, as most everyday words
    traffic light      traffic | light    words are never joined
    aeroplane          aerop | lane       rare in American captions
    diningtable        din | ing | table  VOC's own spelling: not the words that CLIP has seen
    2020               2 | 0 | 2 | 0      digits are never joined either

The vocabulary file is OpenAI's (MIT licence), sha256 924691ac288e5440. Its first line is a header,
each later line one merge, best first.
Ids: 256 bytes, the same 256 at a word's end, one for each merge, start and end of text: 49,408.
"""
import gzip
import html
from functools import cache
from pathlib import Path

import ftfy
import regex
import torch

VOCABULARY = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
# The file has more merges than CLIP uses: 49,152 was the size aimed at, and the 256 bytes and two
# special tokens are taken off.
MERGES = 49152 - 256 - 2
# Ids 49406 and 49407. That END is the largest of all is how the text encoder finds it.
START, END = "<|startoftext|>", "<|endoftext|>"
# What a text is cut into. "don't, 2020!" is: don  't  ,  2  0  2  0  !
PIECES = (
    r"<\|startoftext\|>|<\|endoftext\|>|"
    r"'s|'t|'re|'ve|'m|'ll|'d|"  # English endings
    r"[\p{L}]+|"                 # letters in a row, of any script
    r"[\p{N}]|"                  # digits one by one
    r"[^\s\p{L}\p{N}]+"          # other signs in a row
)


def byte_symbols():
    """GPT-2's table, byte -> printable character.

    The vocabulary is a text file, so bytes need names that can be read and contain no white space.
    Printable Latin-1 characters stand for themselves, the other 68 bytes take the characters from
    256 on: the space, byte 32, is the 33rd of them and becomes character 256 + 32 = 288. A letter
    beyond English is several bytes in UTF-8: "é" is C3 A9, written "Ã©" here, and merged again to
    one symbol, since captions had it often enough.
    The order counts: a byte's place in this table is its token id, so "!" is 0 and "a" is 64.
    """
    # "!" to "~", "¡" to "¬" and "®" to "ÿ". Python counts the space as printable too.
    table = {}
    for byte in range(256):
        if chr(byte).isprintable() and chr(byte) != " ":
            table[byte] = chr(byte)
    moved = [byte for byte in range(256) if byte not in table]
    for i, byte in enumerate(moved):
        table[byte] = chr(256 + i)
    return table


@cache
def vocabulary():
    """(merge -> rank, symbol -> id), read on first use: importing clip reads nothing.

    A merge's rank is its place in the list, 0 for the pair that was commonest when the list began.
    """
    content = gzip.decompress(VOCABULARY.read_bytes())
    lines = content.decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1:MERGES + 1]]  # without the header
    symbols = list(byte_symbols().values())                         # ids 0 to 255
    symbols += [s + "</w>" for s in symbols]                        # 256 to 511
    symbols += ["".join(pair) for pair in merges]                   # 512 to 49,405
    symbols += [START, END]                                         # 49,406 and 49,407
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    ids = {symbol: i for i, symbol in enumerate(symbols)}
    return ranks, ids


@cache
def merge(word):
    """Symbols of the vocabulary that make up one word, given as byte symbols: "cats" ->
    ("cats</w>",).

    No choice of symbols is searched for, the word alone decides: the same word is always the same
    symbols, whatever stands around it. So what was found once is kept.
    """
    ranks, _ = vocabulary()
    parts = list(word)
    parts[-1] += "</w>"
    while len(parts) > 1:
        # Not the first pair nor the longest, but the one that was learned first: so the result is
        # the one that the merges, replayed in the order in which they were learned, would give.
        # A pair that never was one ranks behind all; where the best is such a pair, all are.
        pairs = list(zip(parts, parts[1:]))
        best = min(pairs, key=lambda pair: ranks.get(pair, MERGES))
        if best not in ranks:
            break
        # Joined where it stands first; if it stands elsewhere too, it is the best pair once more,
        # since every pair with the new symbol was learned later than the symbol itself.
        i = pairs.index(best)
        parts[i:i + 2] = ["".join(best)]
    return tuple(parts)


def encode(text):
    """Token ids of a text, without start and end: "A cat!" -> [320, 2368, 256].

    The text is cleaned as CLIP's training texts were: another way would give tokens that are valid
    and rare, which CLIP knows less about, and nothing would show it.
    AUDIT.md: (45).
    """
    _, ids = vocabulary()
    symbols = byte_symbols()
    # Captions came from web pages: broken encodings are mended, and "&amp;amp;", escaped twice, is
    # "&".
    text = ftfy.fix_text(text)
    text = html.unescape(html.unescape(text))
    text = " ".join(text.split())  # all white space is alike
    text = text.lower()            # and so are "Cat" and "cat"
    out = []
    for piece in regex.findall(PIECES, text, regex.IGNORECASE):
        word = "".join(symbols[byte] for byte in piece.encode())
        if word in (START, END):
            parts = [word]  # a special token inside a string stays one token
        else:
            parts = merge(word)
        out += [ids[part] for part in parts]
    return out


def tokenize(texts, context_length=77):
    """Token ids (n, context_length) int64 of n texts, each row: start, text, end, then zeros.

    tokenize(["a cat"], 8) is [[49406, 320, 2368, 49407, 0, 0, 0, 0]]. The zeros need no mask: the
    encoder reads at the end token, which sees only what stands before it.
    texts: a list of strings. Raises ValueError for a text longer than the context: cut
    off, it would be another text.
    AUDIT.md: (44).
    """
    out = torch.zeros(len(texts), context_length, dtype=torch.int64)           # (n, L)
    for row, text in zip(out, texts):
        tokens = encode(START) + encode(text) + encode(END)
        if len(tokens) > context_length:
            raise ValueError(f"{text!r}: {len(tokens)} tokens with start and end, "
                             f"the context has {context_length}")
        row[:len(tokens)] = torch.tensor(tokens)
    return out
