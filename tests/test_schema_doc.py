"""`traces/README.md` and the schema module say the same, both ways."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from moeprof.trace import schema as spec
from moeprof.trace.synthetic import synthetic_trace

README = Path(__file__).parents[1] / "traces" / "README.md"
OBJECTS = (
    spec.TraceInfo,
    spec.ModelInfo,
    spec.StaticBytes,
    spec.Site,
    spec.CapacityRule,
    spec.RankInfo,
    spec.Hardware,
    spec.CaptureCounts,
)


def sections():
    """Returns the rows of the Markdown table under each third-level heading."""
    found = {}
    for block in re.split(r"^### ", README.read_text(encoding="utf-8"), flags=re.M)[1:]:
        name = re.match(r"`([^`]+)`", block)
        if name is None:
            continue
        lines = [line for line in block.split("\n## ")[0].splitlines() if line.startswith("| `")]
        rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
        found[name.group(1).removesuffix("/STACK")] = rows
    return found


def type_name(column):
    arrow_type = column.type
    if pa.types.is_dictionary(arrow_type):
        return "text"
    prefix = ""
    if pa.types.is_list(arrow_type):
        prefix, arrow_type = "list of ", arrow_type.value_type
    names = {"halffloat": "float16", "float": "float32", "double": "float64"}
    name = names.get(str(arrow_type), str(arrow_type))
    return prefix + name + (" per slot" if column.per_slot else "")


def test_every_table_is_described_and_no_other():
    assert set(sections()) == set(spec.TABLES) | {cls.__name__ for cls in OBJECTS}


@pytest.mark.parametrize("name", list(spec.TABLES))
def test_columns_agree_both_ways(name):
    described = [(row[0].strip("`"), row[1], row[2]) for row in sections()[name]]
    stated = [
        (column.name, type_name(column), "yes" if column.nullable else "no")
        for column in spec.TABLES[name].columns
    ]
    assert described == stated
    assert all(len(row) == 4 and row[3] for row in sections()[name])


@pytest.mark.parametrize("cls", OBJECTS, ids=lambda cls: cls.__name__)
def test_fields_of_trace_json_agree_both_ways(cls):
    rows = sections()[cls.__name__]
    assert [row[0].strip("`") for row in rows] == [field.name for field in dataclasses.fields(cls)]
    assert all(len(row) == 3 and row[2] for row in rows)


def test_a_written_trace_json_has_exactly_the_described_fields(tmp_path):
    trace = synthetic_trace(tmp_path / "a.moeprof", num_requests=2, capacity_factor=1.0)
    data = json.loads((tmp_path / "a.moeprof" / "trace.json").read_text())
    site = data["sites"][0]
    objects = {
        "TraceInfo": data,
        "ModelInfo": data["model"],
        "StaticBytes": data["model"]["static_bytes"],
        "Site": site,
        "CapacityRule": site["capacity_rule"],
        "RankInfo": data["ranks"][0],
        "Hardware": data["hardware"],
        "CaptureCounts": data["capture"],
    }
    for name, written in objects.items():
        assert list(written) == [row[0].strip("`") for row in sections()[name]]
    assert spec.info_from_json(data) == trace.info


def test_statuses_are_described():
    rows = re.findall(r"^\| (\d) \| `(\w+)` \|", README.read_text(encoding="utf-8"), flags=re.M)
    assert [(int(value), name) for value, name in rows] == [
        (status.value, status.name) for status in spec.SlotStatus
    ]


def test_the_reading_example_runs(tmp_path, monkeypatch):
    trace = synthetic_trace(tmp_path / "run.moeprof", num_requests=4)
    monkeypatch.chdir(tmp_path)
    text = README.read_text(encoding="utf-8")
    (example,) = [
        code
        for code in re.findall(r"```python\n(.*?)```", text, flags=re.S)
        if "read_parquet" in code
    ]
    names: dict[str, object] = {}
    exec(example, names)
    frame = trace.routing(layers=0)
    expected = np.bincount(frame["expert"], minlength=16)
    assert np.array_equal(names["load"], expected)
    assert isinstance(names["tokens"], pd.DataFrame)


def test_privacy_is_stated():
    text = README.read_text(encoding="utf-8")
    for words in ("as sensitive as the text", "0600", "2602.04105", "Missing is null"):
        assert words in text
