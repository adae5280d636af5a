"""Loops over what a step has recorded, on the host, compiled by Numba: into streams by sequence, and out of them.

A sequence's stream is int32 words in pages: of each token three words, which lie in one page (the bits of its
log-probability, its version, the size of its kept set), and then the set.

Numba compiles a function for the types of its first call: half a second each. A call takes 2 microseconds.
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
def lacks_sets(packed, num_rows):
    """Whether a size, of which a packed step has one per row, is negative."""
    return packed[:num_rows].min() < 0


@njit
def write_routes(rows, packed, slots_at, routes_at, num_tokens):
    """A packed step's routes to the `rows`, uint8 [slots, bytes], of their slots. The later of two for a slot stays.

    Raises IndexError for a slot that there is not.
    """
    num_bytes = rows.shape[1]
    slots = packed[slots_at : slots_at + 2 * num_tokens].view(np.int64)
    routes = packed[routes_at:].view(np.uint8)
    for token in range(num_tokens):
        slot = slots[token]
        if slot < 0 or slot >= len(rows):
            raise IndexError("a packed step names a cache slot that there is not")
        for i in range(num_bytes):
            rows[np.uint64(slot), np.uint64(i)] = routes[np.uint64(token * num_bytes + i)]


@njit
def append_step(store, keys, version, packed, starts_at, logprobs_at, ids_at):
    """A packed step: a token for each sequence of `keys`, int64 [B], below 0 for none.

    False, and nothing is done, if there may be too few pages. Raises IndexError for a set that is not in the step.
    """
    page_words, has_sets = store.pages.shape[1], ids_at < len(packed)
    needed = 0
    for row in range(len(keys)):
        needed += 2 + (HEAD + (packed[row] if has_sets else 0)) // page_words
    if needed > store.num_free[0]:
        return False
    for row in range(len(keys)):
        if keys[row] < 0:
            continue
        size = packed[row] if has_sets else 0
        start = ids_at + packed[starts_at + row] if has_sets else 0
        if size < 0 or start < 0 or start + size > len(packed):
            raise IndexError("a packed step names ids that it does not have")
        _append_token(store, keys[row], (packed[logprobs_at + row], version, size), packed, start)
    return True


@njit(inline="always")  # a call per token would take as long as all else that is done for a short set
def _append_token(store, key, head, packed, start):
    """One token of a sequence; its set begins at `start` of the packed step."""
    pages, sequences = store.pages, store.sequences
    page_words = pages.shape[1]
    page, used = sequences[key, LAST], sequences[key, USED]
    if page_words - used < HEAD:
        page, used = _add_page(store, key), 0
    pages[page, used], pages[page, used + 1], pages[page, used + 2] = head
    used += HEAD
    stop = start + head[2]
    while start < stop:
        if used == page_words:
            page, used = _add_page(store, key), 0
        count = min(stop - start, page_words - used)
        for i in range(count):
            pages[np.uint64(page), np.uint64(used + i)] = packed[np.uint64(start + i)]
        start += count
        used += count
    sequences[key, USED] = used
    sequences[key, TOKENS] += 1
    sequences[key, IDS] += head[2]


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
