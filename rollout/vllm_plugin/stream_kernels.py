"""The step log's loops over tokens and ids, compiled by Numba.

A sequence's log is a stream of int32 words in pages: of each token three words, which lie in one page (the bits of its
log-probability, its version, the size of its kept set), and then the set.
"""

# Numba is not typed for checkers.
# pyright: reportMissingTypeStubs=false
from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

HEAD = 3
"""Words of a token before its set."""
NUM_COLUMNS = 5
FIRST, LAST, USED, TOKENS, IDS = range(NUM_COLUMNS)
"""Columns of a sequence: its first and last page, words of the last one in use, tokens, and ids of all its sets."""


class Store(NamedTuple):
    """The streams of all sequences."""

    pages: np.ndarray  # int32 [pages, words]
    links: np.ndarray  # int32 [pages], the next page of the same sequence
    free: np.ndarray  # int32 [pages], free pages as a stack
    num_free: np.ndarray  # int64 [1]
    sequences: np.ndarray  # int64 [sequences, 5]


@njit
def forget_sequence(store, key):
    """An empty stream, whatever it was."""
    store.sequences[key, :] = 0
    store.sequences[key, FIRST] = -1
    store.sequences[key, LAST] = -1
    store.sequences[key, USED] = store.pages.shape[1]


@njit
def append_step(store, keys, version, logprobs, ids, sizes, starts):
    """A token for each sequence of `keys` (int64 [B], below 0 for none); False, and nothing done, if pages may lack.

    `logprobs`, `sizes` and `starts` are int32 [B]; `ids`, int32, has the sets, each where `starts` says.
    """
    pages, sequences = store.pages, store.sequences
    page_words = pages.shape[1]
    needed = 0
    for row in range(len(keys)):
        if keys[row] >= 0:
            needed += 2 + (HEAD + sizes[row]) // page_words
    if needed > store.num_free[0]:
        return False
    for row in range(len(keys)):
        key = keys[row]
        if key < 0:
            continue
        page, used = sequences[key, LAST], sequences[key, USED]
        if page_words - used < HEAD:
            page, used = _add_page(store, key), 0
        pages[page, used], pages[page, used + 1], pages[page, used + 2] = logprobs[row], version, sizes[row]
        used += HEAD
        start, left = starts[row], sizes[row]
        while left > 0:
            if used == page_words:
                page, used = _add_page(store, key), 0
            count = min(left, page_words - used)
            for i in range(count):
                pages[np.uint64(page), np.uint64(used + i)] = ids[np.uint64(start + i)]
            start += count
            left -= count
            used += count
        sequences[key, USED] = used
        sequences[key, TOKENS] += 1
        sequences[key, IDS] += sizes[row]
    return True


@njit
def _add_page(store, key):
    links, sequences = store.links, store.sequences
    store.num_free[0] -= 1
    page = store.free[store.num_free[0]]
    if sequences[key, LAST] >= 0:
        links[sequences[key, LAST]] = page
    else:
        sequences[key, FIRST] = page
    sequences[key, LAST] = page
    return page


@njit
def read_sequence(store, key, logprobs, versions, offsets, ids):
    """Fills int32 [T], [T], int64 [T + 1] and int32 [N], and forgets the sequence; T and N are its TOKENS and IDS."""
    pages = store.pages
    page_words = pages.shape[1]
    page, used, stop = store.sequences[key, FIRST], 0, 0
    offsets[0] = 0
    for token in range(len(logprobs)):
        if page_words - used < HEAD:
            page, used = _leave(store, page), 0
        logprobs[token], versions[token] = pages[page, used], pages[page, used + 1]
        start, stop = stop, stop + pages[page, used + 2]
        offsets[token + 1] = stop
        used += HEAD
        while start < stop:
            if used == page_words:
                page, used = _leave(store, page), 0
            count = min(stop - start, page_words - used)
            for i in range(count):
                ids[np.uint64(start + i)] = pages[np.uint64(page), np.uint64(used + i)]
            start += count
            used += count
    if page >= 0:
        _leave(store, page)
    forget_sequence(store, key)


@njit
def _leave(store, page):
    """Frees a page. Returns the next, which it still names."""
    store.free[store.num_free[0]] = page
    store.num_free[0] += 1
    return store.links[page]
