"""Host memory that holds experts: one contiguous block per expert, so that a miss is one copy.

Blocks of a site lie behind each other in one piece of memory, page-locked where a GPU will read it.
Within a block every tensor starts at a multiple of `ALIGNMENT_BYTES`, as it does in weights stacked
by torch: matrix products choose their kernels by alignment too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moeprof.errors import MoeprofError
from moeprof.live.experts import ExpertWeights
from moeprof.live.stacking import ExpertLayout

ALIGNMENT_BYTES = 256
LEAST_LOCKED_BYTES = 64 << 20

Bytes = torch.Tensor
"""A one-dimensional tensor of uint8."""


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """What lies where in the block of one expert.

    Attributes:
        shapes: Shape of each tensor, named as in `ExpertWeights`.
        dtype: Of all of them.
        activation: As in `ExpertWeights`.
        gated: As in `ExpertWeights`.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    activation: str
    gated: bool

    @property
    def expert_bytes(self) -> int:
        """Bytes of an expert's tensors."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values()) * self.itemsize

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return self.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        """Bytes of a block: the tensors, each rounded up to the alignment."""
        return sum(_aligned(size) for _, size in self._sizes())

    def _sizes(self) -> Iterable[tuple[str, int]]:
        for name, shape in self.shapes.items():
            yield name, torch.Size(shape).numel() * self.itemsize

    def offsets(self) -> dict[str, int]:
        """Returns the bytes before each tensor of a block."""
        found, start = {}, 0
        for name, size in self._sizes():
            found[name] = start
            start += _aligned(size)
        return found

    def views(self, block: Bytes) -> dict[str, torch.Tensor]:
        """Returns the tensors in a block, as views."""
        offsets = self.offsets()
        return {
            name: block[offsets[name] : offsets[name] + size].view(self.dtype).view(shape)
            for (name, size), shape in zip(self._sizes(), self.shapes.values(), strict=True)
        }

    def stacked_views(self, blocks: Bytes, num_experts: int) -> dict[str, torch.Tensor]:
        """Returns the tensors of all experts as views [experts, ...] of ``blocks``."""
        by_expert = blocks.view(num_experts, self.block_bytes)
        views = {}
        offsets = self.offsets()
        for name, size in self._sizes():
            flat = by_expert[:, offsets[name] : offsets[name] + size].view(self.dtype)
            views[name] = flat.view(num_experts, *self.shapes[name])
        return views

    def weights(self, block: Bytes) -> ExpertWeights:
        """Returns a block as the weights of one expert, as views."""
        return self.stacked_weights(block, 1)

    def stacked_weights(self, blocks: Bytes, num_experts: int) -> ExpertWeights:
        """Returns blocks that lie behind each other as the weights of their experts, as views."""
        tensors = self.stacked_views(blocks, num_experts)
        return ExpertWeights(
            w_in=tensors["w_in"],
            w_out=tensors["w_out"],
            b_in=tensors.get("b_in"),
            b_out=tensors.get("b_out"),
            activation=self.activation,
            gated=self.gated,
        )


@dataclass(frozen=True, kw_only=True)
class ExpertStore:
    """All experts of one site in host memory.

    Attributes:
        num_experts: Experts.
        shape: What lies where in each block.
        memory: [num_experts * block_bytes] uint8 on the CPU; may be a part of a piece that other
            stores read too, at another place.
        is_locked: True where the memory was page-locked here, and has to be unlocked.
    """

    num_experts: int
    shape: BlockShape
    memory: Bytes
    is_locked: bool

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts' tensors."""
        return self.num_experts * self.shape.expert_bytes

    @functools.cached_property
    def _blocks(self) -> tuple[Bytes, ...]:
        return torch.split(self.memory, self.shape.block_bytes)

    def block(self, expert: int) -> Bytes:
        """Returns the block of one expert."""
        return self._blocks[expert]

    def weights(self, expert: int) -> ExpertWeights:
        """Returns one expert on the host."""
        return self.shape.weights(self.block(expert))

    def all_weights(self, device: torch.device | str) -> ExpertWeights:
        """Returns all experts, stacked, on ``device``: one copy of the memory, or the memory."""
        return self.shape.stacked_weights(self.memory.to(device), self.num_experts)

    def emptied(self) -> ExpertStore:
        """Returns what it says of its experts, without their memory."""
        return dataclasses.replace(self, memory=self.memory.new_empty(0), is_locked=False)

    def close(self) -> None:
        """Lets go of the page lock; the memory itself lives as long as its tensors."""
        if self.is_locked:
            unlock(self.memory)


def block_shape(layout: ExpertLayout) -> BlockShape:
    """Returns the shape of blocks for the experts of a module."""
    return BlockShape(
        shapes=layout.shapes,
        dtype=layout.dtype,
        activation=layout.activation,
        gated=layout.gated,
    )


def shape_of_weights(experts: ExpertWeights) -> BlockShape:
    """Returns the shape of blocks for stacked weights."""
    tensors = {
        "w_in": experts.w_in,
        "w_out": experts.w_out,
        "b_in": experts.b_in,
        "b_out": experts.b_out,
    }
    return BlockShape(
        shapes={name: tuple(one.shape[1:]) for name, one in tensors.items() if one is not None},
        dtype=experts.w_in.dtype,
        activation=experts.activation,
        gated=experts.gated,
    )


def store_of_weights(experts: ExpertWeights, *, pinned: bool = False) -> ExpertStore:
    """Returns a copy of stacked weights in host memory."""
    shape = shape_of_weights(experts)
    names = ("w_in", "w_out", "b_in", "b_out")
    sources = {name: getattr(experts, name) for name in names if name in shape.shapes}

    def fill(expert: int, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, source in sources.items():
            tensors[name].copy_(source[expert])

    return make_store(shape, experts.num_experts, fill, pinned=pinned)


def store_of_layout(layout: ExpertLayout, *, pinned: bool = False) -> ExpertStore:
    """Returns a copy of a module's experts in host memory, made expert by expert."""
    return make_store(block_shape(layout), layout.num_experts, layout.write, pinned=pinned)


def make_store(
    shape: BlockShape,
    num_experts: int,
    fill: Callable[[int, Mapping[str, torch.Tensor]], None],
    *,
    pinned: bool = False,
) -> ExpertStore:
    """Returns a store whose blocks were filled one by one.

    Args:
        shape: What lies where in each block.
        num_experts: Experts.
        fill: Writes an expert into views of its block.
        pinned: Page-lock the memory, once it is filled.
    """
    num_bytes = num_experts * shape.block_bytes
    # Much memory is taken plainly and locked afterwards: torch hands page-locked memory out in
    # powers of two, which is up to twice what was asked for. Little memory is left to torch, since
    # two pieces in one page cannot be locked apart.
    by_torch = pinned and num_bytes < LEAST_LOCKED_BYTES
    with torch.inference_mode(False), torch.no_grad():
        memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=by_torch)
        if shape.block_bytes != shape.expert_bytes:
            memory.zero_()
        store = ExpertStore(
            num_experts=num_experts,
            shape=shape,
            memory=memory,
            is_locked=pinned and not by_torch,
        )
        for expert in range(num_experts):
            fill(expert, shape.views(store.block(expert)))
    if store.is_locked:
        lock(memory)
    return store


def host_bytes(stores: Iterable[ExpertStore]) -> int:
    """Returns the bytes of host memory that stores lie in; what several share counts once."""
    pieces = (store.memory.untyped_storage() for store in stores)
    return sum({piece.data_ptr(): piece.nbytes() for piece in pieces}.values())


def on_device(stores: Sequence[ExpertStore], device: torch.device | str) -> Iterator[Bytes]:
    """Yields the memory of each store on a device, where each has its own; on the CPU the store's.

    A piece that several stores lie in comes over the link once, and is copied on the device.
    """
    target = torch.device(device)
    readers = Counter(store.memory.untyped_storage().data_ptr() for store in stores)
    there: dict[int, Bytes] = {}
    for store in stores:
        memory, address = store.memory, store.memory.untyped_storage().data_ptr()
        if target.type == memory.device.type or readers[address] == 1:
            yield memory.to(target)
            continue
        if address not in there:
            whole = torch.empty(0, dtype=torch.uint8).set_(memory.untyped_storage())
            there[address] = whole.to(target)
        first = memory.storage_offset()
        yield there[address][first : first + memory.numel()].clone()


def lock(memory: Bytes) -> None:
    """Page-locks host memory, so that copies from it run beside the program.

    Raises:
        MoeprofError: The driver refuses.
    """
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    result = runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
    if int(result) != 0:
        raise MoeprofError(
            f"the driver does not page-lock {memory.numel() / 2**30:.1f} GiB of host memory "
            f"(error {int(result)})",
            hint="free host memory, or raise the limit of locked memory (ulimit -l)",
        )


def unlock(memory: Bytes) -> None:
    """Takes the page lock off again."""
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    runtime.cudaHostUnregister(memory.data_ptr())


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
