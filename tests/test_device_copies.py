"""Copies through the CUDA driver's own calls: with no driver, with one that refuses, in order."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from moeprof.errors import MoeprofError
from moeprof.live import device_copies

COPIES = [device_copies.copy_to_device, device_copies.copy_to_host]
FAR = 0x7F00_1234_5678
"""An address of more than 32 bits."""


@pytest.fixture
def _forgotten() -> Iterator[None]:
    """No driver is open, before and after."""
    device_copies.opened_driver.cache_clear()
    yield
    device_copies.opened_driver.cache_clear()


class MadeUpDriver:
    """Notes what it is asked for, and answers with a code."""

    def __init__(self, code: int) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.code = code

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: int) -> int:
            self.asked.append((name, *arguments))
            return self.code

        return call


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize("ask", COPIES)
def test_no_driver_is_one_line(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_copies, "_LIBRARY", "libcuda-that-is-nowhere.so.1")
    # Asked twice: the second time is refused as the first was.
    for _ in range(2):
        with pytest.raises(MoeprofError, match="driver cannot be opened") as caught:
            ask(0, 0, 0, 0)
        assert "\n" not in caught.value.message
        assert "libcuda-that-is-nowhere" in caught.value.message
        assert "--device cpu" in (caught.value.hint or "")
        assert caught.value.__cause__ is None


@pytest.mark.parametrize("ask", COPIES)
def test_a_refusal_is_one_line(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_copies, "opened_driver", lambda: MadeUpDriver(code=201))
    with pytest.raises(MoeprofError, match="refused a call: error 201") as caught:
        ask(FAR, FAR, 256, 7)
    assert "\n" not in caught.value.message


def test_the_driver_is_asked_from_where_to_where(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = MadeUpDriver(code=0)
    monkeypatch.setattr(device_copies, "opened_driver", lambda: driver)
    device_copies.copy_to_device(1, 2, 256, 7)
    device_copies.copy_to_host(2, 1, 512, 7)
    # To where comes first in both of the driver's calls.
    assert driver.asked == [
        ("cuMemcpyHtoDAsync_v2", 1, 2, 256, 7),
        ("cuMemcpyDtoHAsync_v2", 2, 1, 512, 7),
    ]


@pytest.mark.usefixtures("_forgotten")
def test_addresses_are_not_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    # Functions of C with the driver's signatures: what they are given is what was asked for.
    seen: list[tuple[int | None, ...]] = []
    kinds = {
        "cuMemcpyHtoDAsync_v2": (
            ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p,
        ),
        "cuMemcpyDtoHAsync_v2": (
            ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p,
        ),
        "cuStreamWaitEvent": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint),
    }  # fmt: skip

    def note(*arguments: int | None) -> int:
        seen.append(arguments)
        return 0

    class Library:
        """Takes a function of C for each name, as a library that was opened gives them."""

    library = Library()
    kept = []
    for name, arguments in kinds.items():
        signature = ctypes.CFUNCTYPE(ctypes.c_int, *arguments)
        kept.append(signature(note))
        address = ctypes.cast(kept[-1], ctypes.c_void_p).value
        assert address is not None
        # Without argument types of its own: those that are set are what counts.
        setattr(library, name, ctypes.CFUNCTYPE(ctypes.c_int)(address))
    monkeypatch.setattr(device_copies.ctypes, "CDLL", lambda _name: library)
    device_copies.copy_to_device(FAR, FAR + 4096, 1 << 33, FAR + 1)
    device_copies.copy_to_host(FAR + 4096, FAR, 1 << 33, 0)
    device_copies.wait_for_event(FAR, FAR + 8)
    assert seen == [
        (FAR, FAR + 4096, 1 << 33, FAR + 1),
        # The default stream is no address.
        (FAR + 4096, FAR, 1 << 33, None),
        (FAR, FAR + 8, 0),
    ]
