"""How long ranks need to exchange rows: an all-to-all of one size after another.

The exchange is the one of `expert_parallel`: bytes, with the parts given, own rows going along. All
parts are equal here; the size is what a rank sends to the others together, which is also what it
receives from them. Leaves out fitting and predicting (`parallel_estimates`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from moeprof.errors import MoeprofError, UsageError
from moeprof.live.parallel_clocks import repeat_together
from moeprof.live.rank_processes import run_ranks
from moeprof.live.repetitions import Repetitions
from moeprof.replay.calibration_file import Curve, Measured

EXCHANGE_BYTES = tuple(1 << power for power in range(13, 27))
"""8 KiB to 64 MiB, each twice the one before."""
LEAST_RANKS = 2


def visible_ranks(device: torch.device) -> int | None:
    """Returns how many ranks can exchange there, one per GPU; None where that is only one."""
    if device.type != "cuda":
        return None
    count = torch.cuda.device_count()
    return count if count >= LEAST_RANKS else None


def exchange_curve(
    num_ranks: int,
    *,
    device: torch.device | str = "cuda",
    sizes: Sequence[int] = EXCHANGE_BYTES,
    repeats: int = 20,
) -> Curve:
    """Starts ranks as processes and times their exchanges.

    With ``cuda`` rank r has GPU r and NCCL carries the rows; with ``cpu`` gloo does, through the
    host's memory.

    Args:
        num_ranks: Processes.
        device: Where the rows are: ``cuda`` or ``cpu``.
        sizes: Bytes that each rank sends to the others, ascending.
        repeats: Timed repetitions of each.

    Returns:
        Seconds by size, of each repetition the slowest rank's.

    Raises:
        UsageError: Fewer than two ranks, or sizes that cannot be dealt to them.
        MoeprofError: There are not so many GPUs.
    """
    place = torch.device(device)
    check_ranks(num_ranks, place)
    if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < num_ranks - 1:
        raise UsageError(f"sizes have to ascend from a byte to each other rank, not {sizes}")
    backend = "nccl" if place.type == "cuda" else "gloo"
    # A rank's return is alike on all: the slowest rank's times.
    times = run_ranks(time_exchanges, num_ranks, tuple(sizes), repeats, backend=backend)[0]
    # Sizes that the others do not divide are sent in equal parts, rounded down.
    sent = [size // (num_ranks - 1) * (num_ranks - 1) for size in sizes]
    return Curve(
        sizes=tuple(map(float, sent)),
        times_s=tuple(Measured.of([each / 1e3 for each in one.times_ms]) for one in times),
    )


def check_ranks(num_ranks: int, device: torch.device) -> None:
    """Refuses ranks that cannot exchange.

    Raises:
        UsageError: They are fewer than two.
        MoeprofError: There are not so many GPUs.
    """
    if num_ranks < LEAST_RANKS:
        raise UsageError(f"{num_ranks} ranks exchange nothing", hint="at least 2 are needed")
    if device.type == "cuda" and num_ranks > torch.cuda.device_count():
        raise MoeprofError(
            f"{num_ranks} ranks need a GPU each, torch can use {torch.cuda.device_count()}",
            hint="ask for fewer ranks",
        )


def time_exchanges(
    device: torch.device | str,
    sizes: Sequence[int],
    repeats: int = 20,
    *,
    group: dist.ProcessGroup | None = None,
) -> list[Repetitions]:
    """Times exchanges of equal parts; every rank of the group calls it.

    Args:
        device: Where the rows of this rank are.
        sizes: Bytes that each rank sends to the others together, a time each; rounded down to
            equal parts.
        repeats: Timed repetitions of each.
        group: The group; None is all ranks.
    """
    num_ranks = dist.get_world_size(group)
    found = []
    for size in sizes:
        splits = [size // (num_ranks - 1)] * num_ranks
        given = torch.zeros(sum(splits), dtype=torch.uint8, device=device)
        taken = torch.empty_like(given)

        def exchange(
            taken: torch.Tensor = taken,
            given: torch.Tensor = given,
            splits: list[int] = splits,
        ) -> None:
            dist.all_to_all_single(
                taken, given, output_split_sizes=splits, input_split_sizes=splits, group=group
            )

        found.append(repeat_together(exchange, device=device, group=group, repeats=repeats))
    return found
