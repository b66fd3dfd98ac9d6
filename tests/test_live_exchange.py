"""All-to-alls between processes, measured for a calibration file."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from calibrations import hand_calibration  # noqa: E402

from moeprof.errors import MoeprofError, UsageError  # noqa: E402
from moeprof.live import calibration, exchange_times  # noqa: E402
from moeprof.live.exchange_times import exchange_curve, visible_ranks  # noqa: E402
from moeprof.live.parallel_estimates import exchange_ms  # noqa: E402
from moeprof.recording.hardware import hardware  # noqa: E402
from moeprof.replay.calibration_file import (  # noqa: E402
    Curve,
    read_calibration,
    write_calibration,
)


def test_two_processes_exchange_and_the_curve_is_kept(tmp_path: Path) -> None:
    curve = exchange_curve(2, device="cpu", sizes=(64, 4096, 1 << 18), repeats=4)
    assert curve.sizes == (64.0, 4096.0, float(1 << 18))
    for each in curve.times_s:
        assert 0 < each.low <= each.median <= each.high
        assert each.num_repetitions == 4
    written = hand_calibration(all_to_all=curve, exchange_ranks=2)
    read = read_calibration(write_calibration(written, tmp_path / "machine.json"))
    assert read.exchange_ranks == 2 and read.all_to_all is not None
    assert exchange_ms(read.all_to_all, 4096) == pytest.approx(curve.times_s[1].median * 1e3)


def test_what_every_rank_sends_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def ranks(function, num_ranks, sizes, repeats, *, backend):
        asked.update(num_ranks=num_ranks, sizes=sizes, repeats=repeats, backend=backend)
        times = [exchange_times.Repetitions((2.0, 4.0, 3.0)) for _ in sizes]
        return [times] * num_ranks

    monkeypatch.setattr(exchange_times, "run_ranks", ranks)
    curve = exchange_curve(4, device="cpu", sizes=(10, 30), repeats=3)
    # Ten bytes are three to each of three others.
    assert curve.sizes == (9.0, 30.0)
    assert [each.median for each in curve.times_s] == [0.003, 0.003]
    assert asked == {"num_ranks": 4, "sizes": (10, 30), "repeats": 3, "backend": "gloo"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    exchange_curve(4, device="cuda")
    assert asked["backend"] == "nccl"
    assert asked["sizes"][0] == 8 << 10 and asked["sizes"][-1] == 64 << 20


def test_what_cannot_exchange_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="1 ranks exchange nothing"):
        exchange_curve(1, device="cpu")
    with pytest.raises(MoeprofError, match="torch can use 1"):
        exchange_curve(2, device="cuda")
    for sizes in ((), (8, 4), (1, 100)):
        with pytest.raises(UsageError, match="sizes have to ascend"):
            exchange_curve(3, device="cpu", sizes=sizes)


def test_a_rank_per_visible_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, ranks in ((0, None), (1, None), (2, 2), (8, 8)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert visible_ranks(torch.device("cuda")) == ranks
        assert visible_ranks(torch.device("cpu")) is None


def test_a_calibration_measures_the_exchange_first(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    curve = Curve(sizes=(1.0,), times_s=(hand_calibration().sync_s,))

    def exchanged(num_ranks, *, device):
        order.append(("exchange", num_ranks, device.type))
        return curve

    def constants(*_, known, trials, **_more):
        assert trials and known == hardware("cpu")
        order.append(("constants",))
        return hand_calibration(), []

    monkeypatch.setattr(calibration, "exchange_curve", exchanged)
    monkeypatch.setattr(calibration, "_measured", constants)
    found = calibration.calibrate("cpu", num_ranks=3)
    assert (found.all_to_all, found.exchange_ranks) == (curve, 3)
    assert order == [("exchange", 3, "cpu"), ("constants",)]
    found = calibration.calibrate("cpu")
    assert (found.all_to_all, found.exchange_ranks) == (None, None)
    assert order[2:] == [("constants",)]
