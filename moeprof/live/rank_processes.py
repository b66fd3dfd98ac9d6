"""Runs a function as the ranks of a process group, each a process of its own.

For tests and measurements on one machine; programs that were started as ranks already (torchrun and
the like) need none of it.
"""

from __future__ import annotations

import datetime
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

TIMEOUT_S = 300.0


def run_ranks(
    function: Callable[..., Any],
    num_ranks: int,
    *arguments: Any,
    backend: str = "gloo",
    timeout_s: float = TIMEOUT_S,
    start_method: str = "spawn",
) -> list[Any]:
    """Runs ``function(device, *arguments)`` on every rank; returns what each returned.

    With ``nccl`` rank r has GPU r; else all run on the CPU, one thread each. All ranks end
    together; where one fails the others are stopped.

    Args:
        function: Found by name in a module that can be imported; called within the process group.
        num_ranks: Processes.
        *arguments: What can be pickled; so must be what it returns.
        backend: Of torch.distributed.
        timeout_s: Longest wait of one rank for another.
        start_method: Of multiprocessing. With ``forkserver`` ranks share what was preloaded, and
            none of them imports it anew; ``fork`` does not go with CUDA.

    Raises:
        torch.multiprocessing.ProcessRaisedException: A rank failed; holds its traceback.
        torch.multiprocessing.ProcessExitedException: A rank was killed.
    """
    with tempfile.TemporaryDirectory(prefix="moeprof-ranks-") as folder:
        given = (num_ranks, folder, backend, timeout_s, function, arguments)
        start_processes(  # type: ignore[no-untyped-call]
            _rank, args=given, nprocs=num_ranks, start_method=start_method
        )
        return [pickle.loads(_result_path(folder, rank).read_bytes()) for rank in range(num_ranks)]


def _rank(
    rank: int,
    num_ranks: int,
    folder: str,
    backend: str,
    timeout_s: float,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    options: dict[str, Any] = {}
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        options["device_id"] = device
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        backend,
        init_method=(Path(folder) / "rendezvous").as_uri(),
        rank=rank,
        world_size=num_ranks,
        timeout=datetime.timedelta(seconds=timeout_s),
        **options,
    )
    result = function(device, *arguments)
    _result_path(folder, rank).write_bytes(pickle.dumps(result))
    # Nobody leaves while another still listens. A rank that fails leaves without: the process ends.
    dist.barrier()
    dist.destroy_process_group()


def _result_path(folder: str, rank: int) -> Path:
    return Path(folder) / f"rank-{rank}.pickle"
