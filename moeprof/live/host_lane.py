"""Experts that are computed on the host, for rows that lie on a device."""

from __future__ import annotations

import torch

from moeprof.live.buffer_settings import BufferedSite
from moeprof.live.transfers import new_event


class HostLane:
    """Brings rows to the host, runs experts there and brings the results back.

    Args:
        device: Where rows come from.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._fetched = new_event() if self._is_cuda else None
        self._returned = new_event() if self._is_cuda else None
        self._is_busy = False
        self._buffers: dict[str, torch.Tensor] = {}
        self._rows: list[torch.Tensor] = []

    def _buffer(self, name: str, rows: int, like: torch.Tensor) -> torch.Tensor:
        found = self._buffers.get(name)
        if (
            found is None
            or found.shape[0] < rows
            or found.dtype != like.dtype
            or (found.shape[1] != like.shape[1])
        ):
            with torch.inference_mode(False):
                found = torch.zeros(
                    2 * rows,
                    like.shape[1],
                    dtype=like.dtype,
                    device=self._device if name == "device" else "cpu",
                    pin_memory=self._is_cuda and name != "device",
                )
            self._buffers[name] = found
        return found[:rows]

    def fetch(self, pieces: list[torch.Tensor]) -> None:
        """Starts bringing rows to the host."""
        if self._is_busy and self._returned is not None:
            self._returned.synchronize()
        total = sum(piece.shape[0] for piece in pieces)
        host = self._buffer("given", total, pieces[0])
        self._rows = []
        start = 0
        for piece in pieces:
            self._rows.append(host[start : start + piece.shape[0]])
            self._rows[-1].copy_(piece, non_blocking=True)
            start += piece.shape[0]
        if self._fetched is not None:
            self._fetched.record(torch.cuda.current_stream(self._device))

    def compute(
        self, place: BufferedSite, experts: list[int], rows: list[list[int]] | None = None
    ) -> list[torch.Tensor]:
        """Returns the fetched rows through their experts, on the device.

        Args:
            place: The site.
            experts: One per piece that was fetched.
            rows: Where one piece was fetched for all: which of its rows each expert is given.
        """
        if self._fetched is not None:
            self._fetched.synchronize()
        if rows is not None:
            (every,) = self._rows
            self._rows = [every[own] for own in rows]
        total = sum(rows.shape[0] for rows in self._rows)
        results = self._buffer("results", total, self._rows[0])
        pieces = [
            place.store.weights(expert).run(0, rows)
            for expert, rows in zip(experts, self._rows, strict=True)
        ]
        torch.cat(pieces, out=results)
        on_device = self._buffer("device", total, results)
        on_device.copy_(results, non_blocking=True)
        if self._returned is not None:
            self._returned.record(torch.cuda.current_stream(self._device))
            self._is_busy = True
        return list(torch.split(on_device, [rows.shape[0] for rows in self._rows]))
