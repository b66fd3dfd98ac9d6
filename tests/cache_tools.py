"""Streams for cache tests: written out by hand, or drawn at random."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moeprof.replay.cache.streams import Stream


def stream_of(
    dispatches: Sequence[Sequence[int]],
    *,
    num_keys: int | None = None,
    sizes: Sequence[int] | None = None,
    phases: Sequence[int] | None = None,
    key_site: Sequence[int] | None = None,
) -> Stream:
    """Returns the stream of dispatches given as rows: keys in order of token and slot."""
    if num_keys is None:
        num_keys = max((max(rows) for rows in dispatches), default=0) + 1
    keys: list[int] = []
    last: list[int] = []
    offset = [0]
    for rows in dispatches:
        first = list(dict.fromkeys(rows))
        by_last = list(dict.fromkeys(reversed(rows)))[::-1]
        place = {key: len(keys) + index for index, key in enumerate(first)}
        last += [place[key] for key in by_last]
        keys += first
        offset.append(len(keys))
    num = len(dispatches)
    key_bytes = [1] * num_keys if sizes is None else list(sizes)
    sites = [0] * num_keys if key_site is None else list(key_site)
    lookups = np.arange(len(keys), dtype=np.int32)
    return Stream(
        replica=0,
        device=0,
        stack="decoder",
        site=0,
        key_site=np.array(sites, np.int32),
        key_expert=np.arange(num_keys, dtype=np.int32),
        key_bytes=np.array(key_bytes, np.int64),
        offset=np.array(offset, np.int64),
        key=np.array(keys, np.int32),
        last=np.array(last, np.int32),
        phase=np.array([2] * num if phases is None else phases, np.uint8),
        rank=np.zeros(num, np.int32),
        step=np.arange(num, dtype=np.int32),
        dispatch_site=np.zeros(num, np.int32),
        num_wanting=np.ones(len(keys), np.int32),
        want_lookup=lookups,
        want_request=np.zeros(len(keys), np.int32),
    )


def random_rows(
    rng: np.random.Generator,
    *,
    num_keys: int,
    num_dispatches: int,
    max_rows: int,
    skew: float = 1.0,
    drift: float = 0.1,
) -> list[list[int]]:
    """Returns dispatches of random size, repeats included, whose popularity drifts."""
    weight = np.arange(1, num_keys + 1, dtype=float) ** -skew
    order = rng.permutation(num_keys)
    dispatches = []
    for _ in range(num_dispatches):
        if rng.random() < drift:
            order = rng.permutation(num_keys)
        drawn = rng.choice(num_keys, size=rng.integers(1, max_rows + 1), p=weight / weight.sum())
        dispatches.append([int(order[each]) for each in drawn])
    return dispatches
