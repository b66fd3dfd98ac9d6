"""Numbers as text, colours, axes: the parts that pages are put together from."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest

from moeprof.reporting import heatmaps, numbers, page, plots


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (0.4149, "share", "41%"),
        (0.0412, "share", "4.1%"),
        (0.0998, "share", "10%"),
        (0.0, "share", "0%"),
        (-0.031, "points", "-3.1 points"),
        (0.25, "points", "25 points"),
        (1536, "bytes", "1.50 KiB"),
        (12.345, "ms", "12.3 ms"),
        (1234567, "count", "1,234,567"),
        (0.98765, "ratio", "0.988"),
        (1, "dispatches", "1 dispatch"),
        (3, "dispatches", "3 dispatches"),
        (3471.6, "tokens/s", "3,472 tokens/s"),
        (None, "share", "unknown"),
        (None, "text", ""),
        ("decode", "text", "decode"),
    ],
)  # fmt: skip
def test_numbers(value, unit, expected):
    assert numbers.formatted(value, unit) == expected


@pytest.mark.parametrize(
    ("low", "high", "unit", "expected"),
    [
        (0.38, 0.44, "share", "38 to 44%"),
        (0.381, 0.384, "share", "38.1 to 38.4%"),
        (0.02, 0.11, "points", "2.0 to 11 points"),
        (2.2, 2.3, "ms", "2.20 to 2.30 ms"),
        (1, 3, "dispatches", "1 to 3 dispatches"),
        (1024, 1 << 20, "bytes", "1 KiB to 1 MiB"),
        (None, 1, "share", ""),
    ],
)
def test_intervals(low, high, unit, expected):
    assert numbers.interval(low, high, unit) == expected


def test_axis_numbers():
    assert [numbers.compact(x) for x in (1, 0.5, 256, 2000)] == ["1", "0.5", "256", "2k"]


def test_png_files_hold_the_pixels():
    panel = {
        "counts": [[0, 5], [10, 0]], "num_tokens": [10, 10], "num_experts": 2, "top_k": 1,
        "rows": ["a", "b"],
    }  # fmt: skip
    uri = heatmaps.data_uri(panel, 1.0)
    assert uri.startswith("data:image/png;base64,")
    pixels = np.array([[0, 255], [128, 3]], dtype=np.uint8)
    data, chunks = heatmaps.png(pixels), {}
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at = 8
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        name, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", data, at + 8 + length)[0] == zlib.crc32(name + body)
        chunks[name] = body
        at += 12 + length
    assert list(chunks) == [b"IHDR", b"PLTE", b"IDAT", b"IEND"]
    assert struct.unpack(">IIBBBBB", chunks[b"IHDR"]) == (2, 2, 8, 3, 0, 0, 0)
    assert chunks[b"PLTE"][-3:] == bytes((253, 231, 37))
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(2, 3)
    assert lines[:, 1:].tolist() == pixels.tolist()


def test_the_colour_map_brightens_evenly():
    """Perceptually uniform: lightness (CIE L*) rises by equal steps."""
    linear = (heatmaps.palette() / 255.0) ** 2.2
    luminance = linear @ np.array([0.2126, 0.7152, 0.0722])
    lightness = 116 * np.cbrt(luminance) - 16
    steps = np.diff(lightness[::15])
    assert (steps > 0).all()
    assert steps.max() < 2 * steps.mean()


def test_one_cell_does_not_take_the_whole_scale():
    counts = np.full((100, 10), 1)
    counts[0, 0] = 10
    panel = {"counts": counts.tolist(), "num_tokens": [10] * 100, "num_experts": 10, "top_k": 1}
    scale = heatmaps.scale_of([panel])
    assert scale == pytest.approx(0.2)
    ticks = dict(heatmaps.legend_ticks([panel], scale))
    assert ticks[0.0] == "0"
    assert ticks[1.0] == "20% or more"
    assert "10% = uniform" in ticks.values()


def test_empty_heat_maps_have_a_scale():
    panel = {"counts": [[0, 0]], "num_tokens": [0], "num_experts": 2, "top_k": 1}
    assert heatmaps.scale_of([panel]) == 1.0


@pytest.mark.parametrize("largest", [0.031, 0.2, 0.77, 1.0, 3e5])
def test_value_axes_reach_the_largest_value(largest):
    place, ticks = plots._value_axis(largest, "share")
    assert ticks[0] == 0
    assert ticks[-1] >= largest * 0.99
    assert 2 <= len(ticks) <= 6
    assert place(0) == plots.HEIGHT - plots.BOTTOM
    assert place(ticks[-1]) == pytest.approx(plots.TOP)


@pytest.mark.parametrize("largest", [700, 5 << 20, 3.3 * (1 << 30)])
def test_byte_axes_have_binary_ticks(largest):
    _, ticks = plots._value_axis(largest, "bytes")
    assert ticks[-1] >= largest * 0.99
    assert np.log2(ticks[1]) % 1 == 0


def test_flat_and_single_points_can_be_drawn():
    for xs in ([], [5.0], [0.0, 0.0]):
        place, ticks = plots._linear_axis(xs)
        assert all(np.isfinite(place(x)) for x in [*xs, *ticks])
    place, ticks = plots._log_axis([1.0])
    assert ticks == [1.0, 2.0]
    assert place(1.0) < place(2.0)


def test_the_first_number_with_a_unit_is_set_off():
    text = "The busiest expert, number 7 of layer 0, gets 20% (18 to 22%) of <b>all</b>, 3 ms"
    assert page.emphasized(text) == (
        "The busiest expert, number 7 of layer 0, gets <strong>20% (18 to 22%)</strong> of "
        "&lt;b&gt;all&lt;/b&gt;, 3 ms"
    )
    assert page.emphasized("no <number>") == "no &lt;number&gt;"


def test_severities_have_names():
    names = [page.severity_name(value) for value in (100, 82, 60, 41, 20)]
    assert names == ["invalid", "warning", "cost", "fact", "note"]
