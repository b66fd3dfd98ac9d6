"""Copies between page-locked host memory and a CUDA device, asked for with little host time.

`Tensor.copy_` takes tens of microseconds to ask for a copy, as long as small copies last; the
driver's own call takes a few. Addresses are plain numbers: whoever calls keeps the memory alive
until the copy is done, and gives page-locked memory, or the host waits.
"""

from __future__ import annotations

import ctypes
import functools

from moeprof.errors import MoeprofError

_LIBRARY = "libcuda.so.1"


@functools.cache
def opened_driver() -> ctypes.CDLL:
    """Returns the driver's library.

    Raises:
        MoeprofError: There is none.
    """
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise MoeprofError(
            f"the CUDA driver cannot be opened: {error}", hint="run on the CPU: --device cpu"
        ) from None
    library.cuMemcpyHtoDAsync_v2.argtypes = [
        ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p,
    ]  # fmt: skip
    library.cuMemcpyDtoHAsync_v2.argtypes = [
        ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p,
    ]  # fmt: skip
    library.cuStreamWaitEvent.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint]
    return library


def copy_to_device(device_address: int, host_address: int, num_bytes: int, stream: int) -> None:
    """Asks for a copy to the device.

    Args:
        device_address: To where.
        host_address: From where.
        num_bytes: How much.
        stream: Handle of the stream (`torch.cuda.Stream.cuda_stream`).

    Raises:
        MoeprofError: The driver refuses.
    """
    check_driver(
        opened_driver().cuMemcpyHtoDAsync_v2(device_address, host_address, num_bytes, stream)
    )


def copy_to_host(host_address: int, device_address: int, num_bytes: int, stream: int) -> None:
    """Asks for a copy to the host; arguments and errors as in `copy_to_device`."""
    check_driver(
        opened_driver().cuMemcpyDtoHAsync_v2(host_address, device_address, num_bytes, stream)
    )


def wait_for_event(stream: int, event: int) -> None:
    """Lets what follows on a stream wait for an event.

    Args:
        stream: Handle of the stream.
        event: Handle of the event (`torch.cuda.Event.cuda_event`).

    Raises:
        MoeprofError: The driver refuses.
    """
    check_driver(opened_driver().cuStreamWaitEvent(stream, event, 0))


def check_driver(code: int) -> None:
    """Raises MoeprofError where the driver answered anything but that all is well."""
    if code != 0:
        raise MoeprofError(f"the CUDA driver refused a call: error {code}")
