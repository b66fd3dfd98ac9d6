"""What the dispatches of a buffer looked up, as a table and for its sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moeprof.live.buffer_settings import BufferedSite
from moeprof.replay.cache.decisions import (
    AHEAD,
    EXPERT,
    HIT,
    LOADS,
    NUM_COLUMNS,
    ON_HOST,
    ROWS,
)

LOOKUP_COLUMNS = (
    "step", "stack", "site", "layer", "expert", "hit", "copied", "ahead", "on_host", "rows",
)  # fmt: skip

# Step, site, and the columns of the decision about its active experts.
LoggedDispatch = tuple[int, int, NDArray[np.int32]]

_NO_COLUMNS = np.zeros((NUM_COLUMNS, 0), np.int32)


def every_column(log: Sequence[LoggedDispatch]) -> NDArray[np.int32]:
    """Returns the decisions about all lookups [NUM_COLUMNS, lookups] in order of execution."""
    return np.concatenate([_NO_COLUMNS, *[columns for _, _, columns in log]], axis=1)


def lookup_table(
    log: Sequence[LoggedDispatch],
    sites: Mapping[int, BufferedSite],
    expert_ids: Mapping[int, NDArray[np.int64]],
) -> pd.DataFrame:
    """Returns one row per lookup in order of execution, with `LOOKUP_COLUMNS`.

    Args:
        log: The dispatches.
        sites: Every site, by its id.
        expert_ids: Id of each expert of a site's store, by the site's id.
    """
    count = np.array([columns.shape[1] for _, _, columns in log], np.int64)
    every = every_column(log)
    places = [sites[site] for _, site, _ in log]
    ids = [expert_ids[site][columns[EXPERT]] for _, site, columns in log]
    values = {
        "step": np.repeat(np.array([step for step, _, _ in log], np.int64), count),
        "stack": np.repeat(np.array([place.stack for place in places], object), count),
        "site": np.repeat(np.array([place.site for place in places], np.int64), count),
        "layer": np.repeat(np.array([place.layer for place in places], np.int64), count),
        "expert": np.concatenate([np.zeros(0, np.int64), *ids]),
        "hit": every[HIT].astype(bool),
        "copied": every[LOADS].astype(bool),
        "ahead": every[AHEAD].astype(bool),
        "on_host": every[ON_HOST].astype(bool),
        "rows": every[ROWS].astype(np.int64),
    }
    return pd.DataFrame({name: values[name] for name in LOOKUP_COLUMNS})
