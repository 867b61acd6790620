"""Repetition inside one text: parts that come again, and n-grams of words that do (Rae et al. 2021, table A1).

Every n-gram gets an exact number, made from the (n-1)-gram's number and the next word, and only places whose (n-1)-gram comes
more than once are looked at: of prose little is left after n = 4. A repeat is an occurrence after the first, as datatrove and
its FineWeb count it. Characters that lie in several repeated n-grams count once, as the paper wants; datatrove steps over a
repeat by n words and so misses the rest of a longer one, and its commonest n-gram may come but once. The price: our duplicate
share is never below datatrove's, and its top share of a text of a few words is not ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

Array = np.ndarray


def repeats(parts: Sequence[str]) -> tuple[int, int]:
    """How many parts were there before, and how many characters they have."""
    once = set(parts)
    return len(parts) - len(once), sum(map(len, parts)) - sum(map(len, once))


def repeated_grams(words: Sequence[str], longest: int) -> Iterator[tuple[int, int, int]]:
    """For n from 2 while any n-gram comes twice: n, characters of the commonest one times its count, characters in repeats.

    The first number counts the spaces between words and the second does not, as in datatrove.
    """
    number = {word: i for i, word in enumerate(dict.fromkeys(words))}
    ids = np.fromiter(map(number.__getitem__, words), np.int64, len(words))
    sizes = np.fromiter(map(len, words), np.int64, len(words))
    places, grams = np.arange(len(words)), ids
    for n in range(2, longest + 1):
        inside = places + n <= len(words)
        places, grams = places[inside], grams[inside]
        keys = grams * len(number) + ids[places + n - 1]
        _, first, grams, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
        common = counts[grams] > 1
        if not common.any():
            return
        later = common.copy()
        later[first] = False
        top = first[counts == counts.max()].min()  # the earliest of equals, as Counter.most_common has it
        characters = sizes[places[top] : places[top] + n].sum() + n - 1
        yield n, int(characters * counts.max()), _covered(places[later], n, sizes)
        places, grams = places[common], grams[common]


def _covered(starts: Array, n: int, sizes: Array) -> int:
    """Characters of the words in any of the spans of n words from `starts`, each word once."""
    edges = np.zeros(len(sizes) + 1, np.int64)
    edges[starts] += 1
    edges[starts + n] -= 1
    return int(sizes[np.cumsum(edges[:-1]) > 0].sum())
