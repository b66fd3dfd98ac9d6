"""Drives a model with recorded routing: experts run as they once ran, whatever the weights say.

A model with random weights routes near uniformly, so nothing measured on it says anything of a
cache or of a skew. Here each MoE site computes with the expert ids and weights of a trace, pass
after pass in recorded order; attention, dense layers and experts compute as they are. What comes
out means nothing as text. Leaves out runners that call layers themselves (`routing_schedules`).
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import nn

from moeprof.errors import CaptureError, UsageError
from moeprof.live.routing_drivers import Driver, Placed, driver_of
from moeprof.live.routing_sources import Routing, RoutingSource, SiteRouting, read_routing
from moeprof.recording import forced as forced_sites
from moeprof.recording.anatomy import anatomy
from moeprof.recording.calls import compiles_by_itself
from moeprof.recording.sites import FoundSite, declared_top_k, find_sites
from moeprof.trace.reader import Trace, open_trace

ROWS = ("exact", "crop", "tile")
TOP_K = ("model", "trace")
EXPERTS = ("same", "subset")

_CALL = nn.Module._call_impl.__code__


def force_routing(
    model_or_layers: nn.Module | Iterable[nn.Module],
    routing: Trace | Routing | str | os.PathLike[str],
    *,
    rows: str = "exact",
    loop: bool = False,
    top_k: str = "model",
    experts: str = "same",
) -> ForcedRouting:
    """Returns a context manager in which a model computes with recorded routing.

    Example::

        with moeprof.live.force_routing(model, moeprof.open("run.moeprof")) as forced:
            model.generate(**inputs)
        print(forced.source)

    Each stack has a cursor: the k-th forward pass of the decoder computes with the k-th recorded
    pass of the decoder. Rows of the batch that the recording left out keep the model's own choice:
    padding, sequences that had ended, tokens that the recorded engine did not run in its last
    layer. Everything is brought to the model's devices on entering; a pass waits for no copy, but
    every site costs some host time more; to time small passes, run layers with `routing_of`. What
    gradient checkpointing runs again in a backward pass computes with the pass it repeats. On
    leaving, whatever happened, the model is as it was.

    A call of the model that ends with an error while a stack is under way gives the recorded passes
    of all its stacks back, so that they stay together; so does an interruption. Where the error
    comes after every stack that began has run through, their passes count: stopping before the
    head, to read activations, goes on to the next pass. A layer called by hand, outside of its
    stack, begins a pass whenever one of its sites ran in the last one already.

    Args:
        model_or_layers: A model of transformers, `paper_lm.PaperLm`, or a torch module whose
            experts were given to `moeprof.register`; or layers that the caller runs in order, for
            which a pass begins whenever a site is called again.
        routing: A trace, or where it lies; or what `read_routing` took of one, or a control.
        rows: What to do where a batch has another number of rows than the pass recorded: refuse
            (``exact``), take the first of them and refuse larger batches (``crop``), or repeat
            them to the length needed (``tile``).
        loop: Begin again when the recorded passes are used up, instead of refusing.
        top_k: ``trace`` lets sites compute with the trace's number of slots where it is not their
            own, which changes their cost; ``model`` refuses.
        experts: ``subset`` accepts a trace of fewer experts than the model has: the others are
            never chosen. ``same`` refuses.

    Raises:
        CaptureError: The model has no MoE layer that can be seen.
        UsageError: Model and routing do not fit, or an option is unknown.
    """
    for name, value, known in (
        ("rows", rows, ROWS),
        ("top_k", top_k, TOP_K),
        ("experts", experts, EXPERTS),
    ):
        if value not in known:
            raise UsageError(f"unknown {name} {value!r}", hint=f"choose one of: {', '.join(known)}")
    if isinstance(routing, (str, os.PathLike)):
        routing = open_trace(routing)
    if not isinstance(routing, (Trace, Routing)):
        raise UsageError(
            f"routing is a {type(routing).__name__}, expected a trace or a Routing",
            hint="pass moeprof.open(path), or what moeprof.live.read_routing returns",
        )
    host = routing if isinstance(routing, Routing) else read_routing(routing)
    if isinstance(model_or_layers, nn.Module):
        model, is_whole = model_or_layers, True
        if isinstance(model, (nn.ModuleList, nn.ModuleDict)):
            is_whole = False
    else:
        model, is_whole = nn.ModuleList(model_or_layers), False
    options = _Options(rows=rows, loop=loop, any_top_k=top_k == "trace", subset=experts == "subset")
    return ForcedRouting(model, host, options, is_whole=is_whole)


@dataclass(frozen=True)
class _Options:
    """How batches that differ from the recording are taken."""

    rows: str
    loop: bool
    any_top_k: bool
    subset: bool

    def said(self) -> list[str]:
        """Returns what a source must say of them."""
        phrases = {
            "crop": "batches take the first rows of a recorded pass where they are smaller",
            "tile": "rows of a recorded pass repeated or cut to the size of the batch",
        }
        said = [phrases[self.rows]] if self.rows in phrases else []
        return [*said, *(["begun again when used up"] if self.loop else [])]


@dataclass(frozen=True)
class _Progress:
    """How far a stack has come.

    Attributes:
        passes: Passes begun since `seek`.
        called: Sites that ran in the last of them.
        repeatable: Recorded passes that a backward pass may run again, and whether gradients were
            enabled as each began: the last two of either kind, since one is told from several.
        was_repeated: True once one was run again: the next pass leaves all before it behind.
    """

    passes: int = 0
    called: frozenset[int] = frozenset()
    repeatable: tuple[tuple[int, bool], ...] = ()
    was_repeated: bool = False


@dataclass
class _Cursor:
    """Which recorded pass a stack computes with.

    Attributes:
        stack: The stack.
        num_passes: Recorded passes.
        loop: Begin again after the last.
        passes: See `_Progress`.
        called: See there.
        repeatable: See there.
        was_repeated: See there.
        start: Pass that `seek` asked for.
        by_module: True where a module around all sites of the stack told that the pass began.
        inside: True while that module runs.
        before: How far the stack had come when this pass began.
    """

    stack: str
    num_passes: int
    loop: bool
    passes: int = 0
    called: set[int] = field(default_factory=set)
    repeatable: tuple[tuple[int, bool], ...] = ()
    was_repeated: bool = False
    start: int = 0
    by_module: bool = False
    inside: bool = False
    before: _Progress = field(default_factory=_Progress)

    def progress(self) -> _Progress:
        """Returns how far the stack has come."""
        return _Progress(self.passes, frozenset(self.called), self.repeatable, self.was_repeated)

    def return_to(self, progress: _Progress) -> None:
        """Gives back the passes begun since."""
        self.passes, self.called = progress.passes, set(progress.called)
        self.repeatable, self.was_repeated = progress.repeatable, progress.was_repeated
        self.inside = False

    def seek(self, step: int) -> None:
        """Makes ``step`` the pass that comes next."""
        self.start, self.by_module = step, False
        self.return_to(_Progress())

    def begin(self) -> None:
        """Goes on to the next pass.

        Raises:
            UsageError: There is none.
        """
        if not self.loop and self.start + self.passes >= self.num_passes:
            raise UsageError(
                f"the routing of the {self.stack} is used up after {self.num_passes} passes",
                hint="run fewer, record more, or begin again: force_routing(..., loop=True)",
            )
        if self.was_repeated:
            self.repeatable, self.was_repeated = (), False
        self.before = self.progress()
        self.passes += 1
        self.called.clear()
        enabled = torch.is_grad_enabled()
        alike = [one for one in self.repeatable if one[1] == enabled]
        others = [one for one in self.repeatable if one[1] != enabled]
        self.repeatable = (*others, *alike[-1:], (self.current, enabled))

    def at(self, site: int) -> int:
        """Returns the pass that a site called now computes with.

        Raises:
            UsageError: There is none, or which it is cannot be told.
        """
        if _in_backward():
            return self._repeated()
        # Inside the module that tells, a site may be called for parts of a pass.
        if self.passes == 0 or (not self.inside and site in self.called):
            self.begin()
            self.by_module = False
        self.called.add(site)
        return self.current

    def _repeated(self) -> int:
        """Returns the pass that gradient checkpointing runs a part of again."""
        self.was_repeated = True
        # Where all of a stack is run again, its own first call may have had gradients disabled.
        any_kind = self.inside or not self.by_module
        found = {step for step, enabled in self.repeatable if enabled or any_kind}
        if len(found) != 1:
            raise UsageError(
                f"a backward pass runs the {self.stack} again, and which recorded pass that "
                "belongs to is not known",
                hint="call backward() after each forward pass; for passes without one use "
                "torch.no_grad(), or seek() after them",
            )
        return found.pop()

    @property
    def current(self) -> int:
        """The pass that runs, or ran last."""
        return (self.start + self.passes - 1) % self.num_passes


def _in_backward() -> bool:
    """Returns True where autograd calls: what runs there was run before (checkpointing)."""
    return torch._C._current_graph_task_id() != -1


def _is_running(module: nn.Module) -> bool:
    """Returns True within a call of a module."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL and frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False


@dataclass(frozen=True, eq=False)
class _DrivenSite:
    """A site of the model and the routing that drives it.

    Attributes:
        index: Place in the model's list of sites.
        found: The site.
        routing: What it computes with.
        driver: How.
        tensors: ``routing`` on the device where the site runs, by device.
    """

    index: int
    found: FoundSite
    routing: SiteRouting
    driver: Driver
    tensors: dict[torch.device, _SiteTensors] = field(default_factory=dict)

    def on(self, device: torch.device) -> _SiteTensors:
        """Returns the routing on a device, uploading it the first time."""
        if device not in self.tensors:
            self.tensors[device] = _SiteTensors.of(self.routing, device)
        return self.tensors[device]


@dataclass(frozen=True)
class _SiteTensors:
    """All passes of a site on a device: ids int64, weights float32, places int64."""

    ids: torch.Tensor
    weights: torch.Tensor
    places: torch.Tensor
    stack_places: torch.Tensor

    @classmethod
    def of(cls, routing: SiteRouting, device: torch.device) -> _SiteTensors:
        """Uploads the routing of a site."""
        return cls(
            ids=torch.from_numpy(routing.experts).to(device=device, dtype=torch.int64),
            weights=torch.from_numpy(routing.weights).to(device),
            places=torch.from_numpy(routing.places).to(device),
            stack_places=torch.from_numpy(routing.stack_places).to(device),
        )


class ForcedRouting:
    """A model driven with recorded routing while entered; see `force_routing`.

    Args:
        model: The model, or a list of layers.
        routing: What drives it.
        options: How batches that differ from the recording are taken.
        is_whole: False for layers that the caller runs one by one.

    Attributes:
        source: Where the routing comes from and what was done to it.
        num_passes: Recorded passes of each stack.
    """

    def __init__(
        self, model: nn.Module, routing: Routing, options: _Options, *, is_whole: bool
    ) -> None:
        self._model = model
        self._options = options
        found = find_sites(model)
        self._sites, changes = _matched(model, found, routing, options)
        self._stacks = anatomy(model, found).stacks if is_whole else {}
        self._cursors = {
            name: _Cursor(name, len(stack), options.loop) for name, stack in routing.stacks.items()
        }
        self._before_call: dict[str, _Progress] = {}
        self._unfinished: set[str] = set()
        self._handled: dict[str, BaseException | None] = {}
        self.source: RoutingSource = routing.source.changed(*changes, *options.said())
        self.num_passes: Mapping[str, int] = {
            name: len(stack) for name, stack in routing.stacks.items()
        }
        self._handles: list[Any] = []
        self._undo_generate: Callable[[], None] | None = None
        self._num_driven = 0

    def __repr__(self) -> str:
        return f"<ForcedRouting of {type(self._model).__name__} by {self.source}>"

    def __enter__(self) -> ForcedRouting:
        watched = [site.found.watched for site in self._sites]
        other = forced_sites.forced_source(watched)
        if other is not None:
            raise UsageError(
                f"the model is driven already, by {other}",
                hint="leave that context first: a site computes with one routing at a time",
            )
        self.seek(0)
        self._num_driven = 0
        try:
            self._attach()
        except BaseException:
            self._detach()
            raise
        forced_sites.mark(watched, str(self.source))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        forced_sites.unmark(site.found.watched for site in self._sites)
        self._detach()
        if kind is None and not self._num_driven:
            raise CaptureError(
                "no MoE layer was driven: none ran where hooks are called",
                hint="run the model inside the context, in eager mode; after torch.compile call "
                "torch._dynamo.reset() first",
            )

    @property
    def passes(self) -> Mapping[str, int]:
        """Forward passes driven since entering or `seek`, by stack."""
        return {name: cursor.passes for name, cursor in self._cursors.items()}

    def seek(self, step: int = 0, *, stack: str | None = None) -> None:
        """Makes ``step`` the recorded pass that comes next, of one stack or of all.

        Raises:
            UsageError: There is no such pass or stack.
        """
        if stack is not None and stack not in self._cursors:
            raise UsageError(
                f"no stack {stack!r} is driven", hint=f"driven are: {', '.join(self._cursors)}"
            )
        for name, cursor in self._cursors.items():
            if stack is not None and name != stack:
                continue
            if not 0 <= step < cursor.num_passes:
                raise UsageError(
                    f"the routing of the {name} has {cursor.num_passes} passes, no pass {step}"
                )
            cursor.seek(step)
            self._before_call.pop(name, None)
            self._unfinished.discard(name)

    def _attach(self) -> None:
        for stack, cursor in self._cursors.items():
            module = self._stacks.get(stack)
            if module is None:
                continue
            begin = functools.partial(self._pass_begins, cursor)
            end = functools.partial(self._pass_ends, cursor)
            self._handles += [
                module.register_forward_pre_hook(begin, prepend=True),
                module.register_forward_hook(end, always_call=True),
            ]
        if self._stacks:
            # Before a stack that is the model itself; and last at the end.
            self._handles += [
                self._model.register_forward_pre_hook(self._call_begins, prepend=True),
                self._model.register_forward_hook(self._call_ends, always_call=True),
            ]
        for site in self._sites:
            site.on(_device_of(site.found))
            self._attach_site(site)
        self._undo_generate = _keep_generate_eager(self._model, lambda: bool(self._handles))

    def _attach_site(self, site: _DrivenSite) -> None:
        """Attaches before all hooks there are: a recorder then sees what the site computes with."""
        driver, module = site.driver, site.driver.module
        choose = functools.partial(self._choose, site)

        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            return driver.apply(args, kwargs, None, choose)

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            return driver.apply(args, kwargs, output, choose)

        if driver.before:
            handle = module.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
        else:
            handle = module.register_forward_hook(after, with_kwargs=True, prepend=True)
        self._handles.append(handle)
        check = driver.check
        if check is not None:

            def verify(module: nn.Module, args: Any, kwargs: Any) -> None:
                check(args, kwargs)

            self._handles.append(
                site.found.watched.register_forward_pre_hook(verify, with_kwargs=True)
            )

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._undo_generate is not None:
            self._undo_generate()
            self._undo_generate = None
        for cursor in self._cursors.values():
            cursor.inside = False
        self._before_call.clear()
        self._unfinished.clear()
        self._handled.clear()
        for site in self._sites:
            site.tensors.clear()

    def _call_begins(self, module: nn.Module, args: Any) -> None:
        if _in_backward():
            return
        self._give_back()  # Of one that was interrupted.
        self._before_call = {name: cursor.progress() for name, cursor in self._cursors.items()}
        self._handled[""] = sys.exception()

    def _call_ends(self, module: nn.Module, args: Any, output: Any) -> None:
        if _in_backward():
            return
        if self._has_failed("", output):
            self._give_back()
        self._before_call.clear()
        self._unfinished.clear()

    def _give_back(self) -> None:
        """Gives back the passes of a call of the model that did not end, of all stacks or of none.

        Stacks that have all run through keep theirs.
        """
        if self._unfinished:
            for name, progress in self._before_call.items():
                self._cursors[name].return_to(progress)
        self._before_call.clear()
        self._unfinished.clear()

    def _forget_interrupted(self) -> None:
        """Gives back what was interrupted, which calls no hooks."""
        if self._before_call and not _is_running(self._model):
            self._give_back()
        for name, cursor in self._cursors.items():
            if cursor.inside and not _is_running(self._stacks[name]):
                cursor.return_to(cursor.before)
                self._unfinished.discard(name)

    def _has_failed(self, stack: str, output: Any) -> bool:
        """Returns True where a hook is called for an error, not for what a module returned."""
        handled = self._handled.pop(stack, None)
        return output is None and sys.exception() is not handled

    def _pass_begins(self, cursor: _Cursor, module: nn.Module, args: Any) -> None:
        if not _in_backward():
            if self._before_call and not _is_running(self._model):
                self._give_back()  # Of a call that was interrupted: this one is outside of it.
            if cursor.inside:
                # An interruption calls no hooks.
                cursor.return_to(cursor.before)
            self._unfinished.add(cursor.stack)
            cursor.begin()
            cursor.by_module = True
            self._handled[cursor.stack] = sys.exception()
        cursor.inside = True

    def _pass_ends(self, cursor: _Cursor, module: nn.Module, args: Any, output: Any) -> None:
        was_inside, cursor.inside = cursor.inside, False
        if not was_inside or _in_backward():
            return
        if self._has_failed(cursor.stack, output):
            cursor.return_to(cursor.before)
            return
        for site in self._sites:
            if site.found.stack != cursor.stack or site.index in cursor.called:
                continue
            starts = site.routing.starts
            if starts[cursor.current] < starts[cursor.current + 1]:
                raise CaptureError(
                    f"{site.found.name} ran in no way that can be driven: its hook was not called",
                    hint="run it in eager mode, without kernels that replace whole modules",
                )
        self._unfinished.discard(cursor.stack)

    def _choose(
        self, site: _DrivenSite, num_rows: int, top_k: int, device: torch.device
    ) -> Placed | None:
        """Returns what a site computes with in the pass that runs; see `routing_drivers.Choose`."""
        cursor = self._cursors[site.found.stack]
        if site.index in cursor.called and not _in_backward():
            self._forget_interrupted()
        passes = cursor.passes
        step = cursor.at(site.index)
        try:
            placed = self._placed(site, step, num_rows, top_k, device)
        except UsageError:
            if cursor.passes != passes:
                # Who calls layers one by one has no call of a model that ends.
                cursor.return_to(cursor.before)
            raise
        self._num_driven += 1
        return placed

    def _placed(
        self, site: _DrivenSite, step: int, num_rows: int, top_k: int, device: torch.device
    ) -> Placed | None:
        """Returns the routing of a recorded pass for a batch; None where none was recorded.

        Raises:
            UsageError: It does not fit the batch.
        """
        routing = site.routing
        start, end = int(routing.starts[step]), int(routing.starts[step + 1])
        num_tokens, recorded_rows = end - start, int(routing.num_rows[step])
        where = f"pass {step} of {site.found.name}"
        if routing.top_k != top_k and not self._options.any_top_k:
            raise _other_top_k(site.found, routing, top_k)
        tensors = site.on(device)
        rows = slice(start, end)
        if num_rows == num_tokens:
            return Placed(tensors.ids[rows], tensors.weights[rows], None)
        if num_rows in (recorded_rows, int(routing.num_stack_rows[step])):
            if routing.top_k > top_k:
                raise UsageError(
                    f"{where}: rows that were not recorded choose {top_k} experts, the others "
                    f"{routing.top_k}",
                    hint="drive batches without padding, or a model of the trace's top_k",
                )
            if not num_tokens:
                return None
            places = tensors.places if num_rows == recorded_rows else tensors.stack_places
            return Placed(tensors.ids[rows], tensors.weights[rows], places[rows])
        if self._options.rows == "exact" or not num_tokens:
            raise UsageError(
                f"{where} was recorded with {_counted(num_tokens, recorded_rows)}, and is called "
                f"with {num_rows} rows",
                hint="run the batch that was recorded, re-batch the trace "
                "(moeprof.live.rebatched_routing), or pass rows='tile' or rows='crop'",
            )
        if self._options.rows == "crop" and num_rows > num_tokens:
            raise UsageError(
                f"{where} was recorded with {num_tokens} tokens, fewer than the {num_rows} rows it "
                "is called with",
                hint="rows='tile' repeats them; moeprof.live.rebatched_routing makes real batches",
            )
        taken = torch.arange(num_rows, device=device) % num_tokens
        return Placed(tensors.ids[rows][taken], tensors.weights[rows][taken], None)


def _counted(num_tokens: int, num_rows: int) -> str:
    padded = num_rows - num_tokens
    return f"{num_tokens} tokens" + (f" and {padded} rows of padding" if padded > 0 else "")


def _matched(
    model: nn.Module, found: list[FoundSite], routing: Routing, options: _Options
) -> tuple[list[_DrivenSite], list[str]]:
    """Returns the sites to drive, and what the source must say of them.

    Raises:
        UsageError: Model and routing do not fit.
    """
    stacks = {site.stack for site in found}
    unknown = [name for name in routing.stacks if name not in stacks]
    if unknown:
        raise UsageError(
            f"the routing is for the {unknown[0]}, and the model has no MoE layer there",
            hint="take the stacks it has: moeprof.live.read_routing(trace, stacks=[...])",
        )
    sites, changes = [], []
    for name in sorted(stacks, key=lambda name: name != "encoder"):
        own = [(index, site) for index, site in enumerate(found) if site.stack == name]
        if name not in routing.stacks:
            changes.append(f"the {name} makes its own choice")
            continue
        given = routing.stacks[name].sites
        if len(own) != len(given):
            raise UsageError(
                f"the routing has {len(given)} MoE sites in the {name}, the model {len(own)}",
                hint="take as many: moeprof.live.read_routing(trace, sites=[...])",
            )
        if not len(routing.stacks[name]):
            raise UsageError(f"the routing has no pass of the {name}")
        for (index, site), recorded in zip(own, given, strict=True):
            changes += _geometry_changes(model, site, recorded, options)
            driver = driver_of(site)
            if recorded.has_empty_slots and not driver.takes_empty:
                raise UsageError(
                    f"{site.name} cannot be driven with this routing: some slots hold no expert, "
                    "and its experts cannot leave a slot empty",
                    hint="take a trace whose tokens fill every slot",
                )
            sites.append(_DrivenSite(index, site, recorded, driver))
    return sites, list(dict.fromkeys(changes))


def _geometry_changes(
    model: nn.Module, site: FoundSite, recorded: SiteRouting, options: _Options
) -> list[str]:
    """Returns what differs between a site and what was recorded, where that is allowed."""
    said = []
    if site.num_experts != recorded.num_experts:
        if site.num_experts < recorded.num_experts or not options.subset:
            raise UsageError(
                f"{site.name} has {site.num_experts} experts, the routing {recorded.num_experts}",
                hint="drive a model of the recorded geometry"
                + (
                    "; experts='subset' leaves the model's other experts unused"
                    if site.num_experts > recorded.num_experts
                    else ""
                ),
            )
        said.append(f"the first {recorded.num_experts} of {site.num_experts} experts used")
    declared = declared_top_k(model, site)
    if declared is not None and declared != recorded.top_k:
        if not options.any_top_k:
            raise _other_top_k(site, recorded, declared)
        said.append(f"top-{recorded.top_k} instead of the model's top-{declared}")
    return said


def _other_top_k(site: FoundSite, recorded: SiteRouting, top_k: int) -> UsageError:
    return UsageError(
        f"{site.name} routes to {top_k} experts per token, the routing to {recorded.top_k}",
        hint=f"build the model with top_k {recorded.top_k}, or pass top_k='trace'",
    )


def _device_of(site: FoundSite) -> torch.device:
    """Returns where a site runs; where weights come and go, the first call tells."""
    modules = (site.modules.experts, site.modules.block)
    parameters = (p for module in modules if module is not None for p in module.parameters())
    devices = (p.device for p in parameters if p.device.type != "meta")
    return next(devices, torch.device("cpu"))


def _keep_generate_eager(
    model: nn.Module, is_open: Callable[[], bool]
) -> Callable[[], None] | None:
    """Keeps transformers' `generate` from compiling what must be driven; returns what undoes it."""
    original = getattr(model, "generate", None)
    if not callable(original) or not compiles_by_itself(model):
        return None

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        if is_open():
            kwargs = {**kwargs, "disable_compile": True}
        return original(*args, **kwargs)

    own = vars(model)
    had_own = "generate" in own
    own["generate"] = generate

    def undo() -> None:
        # A recorder may have come and not gone; this wrapper then passes calls on.
        if own.get("generate") is not generate:
            return
        if had_own:
            own["generate"] = original
        else:
            own.pop("generate")

    return undo
