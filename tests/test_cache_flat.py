"""Flat streams: equal to the machines, and to libcachesim where it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from cache_tools import stream_of

from moeprof.replay.cache import curves, flat, reference

NUM_KEYS = 600


def _keys(kind: str, length: int, *, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if kind == "cyclic":
        return np.arange(length, dtype=np.int32) % 48
    if kind == "experts":
        # 12 layers in turn, top-4 of 50, hot sets drifting.
        steps = length // 48 + 1
        hot = rng.normal(size=(12, 50))
        keys = []
        for _ in range(steps):
            hot = 0.9 * hot + 0.45 * rng.normal(size=hot.shape)
            top = np.argsort(-hot, axis=1)[:, :4]
            keys.append(top + 50 * np.arange(12)[:, None])
        return np.concatenate(keys, axis=None)[:length].astype(np.int32)
    weight = np.arange(1, NUM_KEYS + 1) ** -float(kind)
    return rng.choice(NUM_KEYS, size=length, p=weight / weight.sum()).astype(np.int32)


@pytest.mark.parametrize("policy", flat.POLICIES)
def test_equal_to_the_machines(policy: str) -> None:
    for kind in ("0.9", "experts", "cyclic"):
        key = _keys(kind, 1500)
        stream = stream_of([[int(each)] for each in key], num_keys=NUM_KEYS)
        for capacity in (1, 7, 60, 300):
            slow = reference.replay(
                stream, policy, sizes=[1] * NUM_KEYS, capacity=capacity, semantics="sequential"
            )
            found = flat.num_misses(policy, key, num_keys=NUM_KEYS, capacity=capacity)
            assert found == int((~slow.hit).sum())


@pytest.mark.parametrize("policy", flat.CURVES)
def test_curves_equal_single_sizes(policy: str) -> None:
    for kind in ("0.6", "1.1", "experts", "cyclic"):
        key = _keys(kind, 20_000, seed=1)
        curve = flat.misses_at_all_capacities(policy, key, num_keys=NUM_KEYS)
        for capacity in (1, 2, 3, 17, 47, 48, 128, 300, 599, 600):
            assert curve[capacity - 1] == flat.num_misses(
                policy, key, num_keys=NUM_KEYS, capacity=capacity
            )


def test_an_lru_curve_can_be_continued() -> None:
    rng = np.random.default_rng(2)
    rows = [rng.integers(0, 90, size=rng.integers(1, 60)).tolist() for _ in range(400)]
    whole = stream_of(rows, num_keys=90)
    reached = curves.reach(whole, "lru")
    state = curves.LruState.empty(90)
    found = []
    for first in range(0, 400, 130):
        part = stream_of(rows[first : first + 130], num_keys=90)
        hit = np.empty(part.num_lookups, np.int32)
        curves.lru_batch(part.offset, part.key, part.last, 90, hit, state)
        found.append(hit)
    np.testing.assert_array_equal(np.concatenate(found), reached.hit)


parity = pytest.mark.skipif(
    importlib.util.find_spec("libcachesim") is None,
    reason="libcachesim is not installed (pip install 'moeprof[parity]'; it is GPL-3, tests only)",
)
THEIR_NAMES = {
    "lru": "LRU", "fifo": "FIFO", "lfu": "LFU", "arc": "ARC", "s3fifo": "S3FIFO", "min": "Belady",
}  # fmt: skip


@parity
@pytest.mark.parametrize("policy", list(THEIR_NAMES))
@pytest.mark.parametrize("kind", ["1.0", "0.6", "experts", "cyclic"])
def test_equal_to_libcachesim(policy: str, kind: str, tmp_path: Path) -> None:
    """Miss counts are the same to the last one."""
    import libcachesim

    key = _keys(kind, 60_000, seed=3)
    path = tmp_path / "trace.oracleGeneral"
    oracle_file(key, path)
    reader = libcachesim.TraceReader(
        str(path),
        libcachesim.TraceType.ORACLE_GENERAL_TRACE,
        libcachesim.ReaderInitParam(ignore_obj_size=True),
    )
    for capacity in (20, 24, 45, 150, 450):
        reader.reset()
        cache = getattr(libcachesim, THEIR_NAMES[policy])(cache_size=capacity, hashpower=16)
        ratio, _ = cache.process_trace(reader, start_req=0, max_req=-1)
        theirs = round(ratio * len(key))
        assert abs(ratio * len(key) - theirs) < 1e-3
        assert flat.num_misses(policy, key, num_keys=NUM_KEYS, capacity=capacity) == theirs


def oracle_file(key: np.ndarray, path: Path) -> None:
    """Writes keys as libcachesim's oracleGeneral: time, id, size, next time (-1 = never)."""
    rows = np.zeros(
        len(key), np.dtype([("t", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")])
    )
    rows["t"] = np.arange(len(key))
    rows["id"] = key
    rows["size"] = 1
    upcoming = np.full(len(key), -1)
    order = np.lexsort((np.arange(len(key)), key))
    same = np.diff(key[order]) == 0
    upcoming[order[:-1][same]] = order[1:][same]
    rows["next"] = upcoming
    rows.tofile(path)
