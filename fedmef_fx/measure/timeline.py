"""`StepTimeline`: what is alive at every moment of a training step, by what it is for and by the layer at work.

It watches the dispatcher, so it sees every tensor that torch operations make, on any device and also tensors without
values; packed buffers and the temporaries of the packing kernels are announced to it. Not seen are workspaces inside
an operation, such as those of a convolution: `fedmef_fx.measure.allocator` has a figure that includes them.
"""

import dataclasses
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fedmef_fx.measure.live import tensors_in
from fedmef_fx.measure.meter import SavedTensors
from fedmef_fx.packing.registry import listening

__all__ = ["CATEGORIES", "AttributedSaves", "Category", "Event", "LayerMemory", "Phase", "Site", "StepTimeline"]

Category = Literal["weights", "buffers", "inputs", "gradients", "optimizer", "saved", "transients"]
CATEGORIES: Final[tuple[Category, ...]] = (
    "weights",
    "buffers",
    "inputs",
    "gradients",
    "optimizer",
    "saved",
    "transients",
)
Phase = Literal["forward", "backward", "optimizer"]

_ADD: Final = torch.ops.aten.add.Tensor
_WRAPPERS: Final = ("torch._dynamo", "torch._compile")
"""Modules of what torch puts around a mode's `__torch_dispatch__`."""
_LAYER: Final = "fedmef_fx.layer"
"""Where an autograd node says which layer made it, in its metadata."""


@dataclasses.dataclass(frozen=True, slots=True)
class Site:
    """A moment of a training step.

    Attributes:
        phase: Part of the step.
        path: Module at work; "" is the model itself or code outside of it.
        op: The operation that had just run.
    """

    phase: Phase
    path: str
    op: str

    def __str__(self) -> str:
        return f"{self.phase}, {self.path or 'model'}, {self.op}"


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """What was alive right after an operation.

    Attributes:
        site: The operation.
        live: Bytes per category, in the order of `CATEGORIES`.
    """

    site: Site
    live: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class LayerMemory:
    """What one layer takes.

    Attributes:
        path: The module; "" is the model itself, "loss" the loss function.
        held: Bytes that exist at the end of forward because this layer saved them for its backward. What several
            layers save is the first one's.
        transients: The most that was alive above the level at which the layer was entered, in forward or backward.
    """

    path: str
    held: int
    transients: int


class StepTimeline(TorchDispatchMode):
    """Follow one training step; all its reports are about the time since its creation.

    Use `during` around each phase; `hold` says what tensors are for, `enter` and `leave` which layer runs.

    Attributes:
        current: Bytes alive now, by category.
        peak: The most that was alive at any moment.
        peak_site: When.
        at_peak: By category, at that moment.
        transients: The most that was alive in the category "transients" at any moment.
        events: Every change, in order.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self.current: dict[Category, int] = dict.fromkeys(CATEGORIES, 0)
        self.peak = self.transients = 0
        self.peak_site = Site("forward", "", "start")
        self.at_peak: Mapping[Category, int] = dict(self.current)
        self.events: list[Event] = []
        self._storages: dict[int, _Storage] = {}
        self._phase: Phase = "forward"
        self._stack: list[str] = [""]
        self._level, self._backward_path = 0, ""
        self._held: dict[str, int] = {}
        self._above: dict[str, int] = {}
        self._parameters: dict[int, str] = {}

    # What is followed

    def hold(self, tensors: Iterable[Tensor], category: Category) -> None:
        """Say what tensors are for; they count there as long as they live."""
        for tensor in tensors:
            storage = self._meet(tensor)
            if storage is not None:
                self._move(storage, category)
                storage.is_fixed = True

    def name_parameters(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Tell parameters' names, so that the optimizer's work on each can be told apart."""
        self._parameters = {p.untyped_storage()._cdata: name.rpartition(".")[0] for name, p in named}

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Follow what happens in the block, which is a phase of the step."""
        self._phase, self._stack, self._backward_path = phase, [""], ""
        self._level = self.total
        with ExitStack() as stack:
            stack.enter_context(listening(self))
            stack.enter_context(self)
            yield

    @property
    def total(self) -> int:
        """All bytes alive now."""
        return sum(self.current.values())

    # Layers

    def enter(self, path: str, inputs: Any = ()) -> None:
        """A layer begins. What computed its inputs belongs to its caller."""
        self._claim(inputs, self._stack[-1])
        self._stack.append(path)
        self._level = self.total

    def leave(self, result: Any) -> None:
        """The layer that began last ends with a result."""
        self._claim(result, self._stack.pop())
        self._level = self.total

    def _claim(self, value: Any, path: str) -> None:
        """Write the layer on the autograd nodes behind a value that no layer has claimed yet."""
        nodes: list[Any] = [tensor.grad_fn for tensor in tensors_in(value)]
        while nodes:
            node = nodes.pop()
            if node is not None and _LAYER not in node.metadata:
                node.metadata[_LAYER] = path
                nodes += [function for function, _ in node.next_functions]

    def _site(self, op: str, storages: Iterable[int] = ()) -> Site:
        if self._phase == "forward":
            return Site("forward", self._stack[-1], op)
        path = self._backward_path
        if self._phase == "backward":
            node: Any = torch._C._current_autograd_node()
            path = path if node is None else node.metadata.get(_LAYER, path)
        else:
            path = next((self._parameters[key] for key in storages if key in self._parameters), path)
        if path != self._backward_path:
            self._backward_path, self._level = path, self.total
        return Site(self._phase, path, op)

    # Saved tensors

    def saved(self, tensor: Tensor, keeper: object) -> None:
        """Autograd keeps a tensor for as long as `keeper` lives."""
        storage = self._meet(tensor)
        if storage is None:
            return
        storage.keepers += 1
        if storage.keepers == 1:
            storage.saver = self._stack[-1]
            if not storage.is_fixed:
                self._move(storage, "saved")
        timeline = weakref.ref(self)
        weakref.finalize(keeper, _let_go, timeline, tensor.untyped_storage()._cdata)

    def hear_buffer(self, buffer: Tensor) -> None:
        """A packed buffer was made: it exists to be kept."""
        storage = self._meet(buffer)
        if storage is not None and not storage.is_fixed:
            storage.keepers += 1  # never let go: it is freed with its owner
            storage.saver = self._stack[-1]
            self._move(storage, "saved")

    def hear_temporary(self, nbytes: int) -> None:
        """A packing kernel used memory outside of torch for a moment."""
        self.current["transients"] += nbytes
        self._note(self._site("packing kernel"))
        self.current["transients"] -= nbytes

    def end_forward(self) -> None:
        """The forward pass is over; what is saved now is what is held. Of several passes the first one counts."""
        if self._held:
            return
        for storage in self._storages.values():
            if storage.category == "saved":
                self._held[storage.saver] = self._held.get(storage.saver, 0) + storage.nbytes

    @property
    def layers(self) -> tuple[LayerMemory, ...]:
        """Every layer that ran, in the order of their first operation."""
        paths = dict.fromkeys([*self._above, *self._held])
        return tuple(LayerMemory(path, self._held.get(path, 0), self._above.get(path, 0)) for path in paths)

    # The dispatcher

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operation and take note of its tensors."""
        del types
        site = self._site(str(getattr(func, "overloadpacket", func)), _storage_keys(args))
        out = func(*args, **(kwargs or {}))
        for tensor in tensors_in((args, kwargs, out)):
            self._meet(tensor)
        if not (func is _ADD and self._phase == "backward" and _is_called_by_engine(sys._getframe(1))):
            self._note(site)
        return out

    def _note(self, site: Site) -> None:
        live = tuple(self.current.values())
        total = sum(live)
        self.transients = max(self.transients, self.current["transients"])
        if total > self.peak:
            self.peak, self.peak_site, self.at_peak = total, site, dict(self.current)
        if site.phase != "optimizer":
            self._above[site.path] = max(self._above.get(site.path, 0), total - self._level)
        if not self.events or self.events[-1].live != live:
            self.events.append(Event(site, live))

    def _meet(self, tensor: Tensor) -> "_Storage | None":
        if tensor.layout is not torch.strided:
            return None
        untyped = tensor.untyped_storage()
        key, nbytes = untyped._cdata, untyped.nbytes()
        storage = self._storages.get(key)
        if storage is None:
            # The callback must not keep the timeline alive for as long as the tensors it saw.
            timeline = weakref.ref(self)
            storage = self._storages[key] = _Storage(weakref.ref(untyped, lambda _: _release(timeline, key)))
        if storage.nbytes != nbytes:  # new, or resized in place
            self.current[storage.category] += nbytes - storage.nbytes
            storage.nbytes = nbytes
        return storage

    def _move(self, storage: "_Storage", category: Category) -> None:
        self.current[storage.category] -= storage.nbytes
        self.current[category] += storage.nbytes
        storage.category = category


@dataclasses.dataclass(slots=True)
class _Storage:
    """A storage that is alive."""

    reference: weakref.ref[torch.UntypedStorage]
    nbytes: int = 0
    category: Category = "transients"
    is_fixed: bool = False
    keepers: int = 0  # saved tensors on it that autograd holds
    saver: str = ""


def _is_called_by_engine(caller: FrameType | None) -> bool:
    """Whether autograd's engine called an operation: no Python of a backward function lies between.

    Where gradients of a tensor with several readers meet it adds to the one that it has, in place, if nobody else holds
    that. While a dispatch mode is on it makes a third tensor, and lets go of the first at once: what is alive after the
    next operation is what would be without this timeline.
    """
    while caller is not None and caller.f_globals.get("__name__", "").startswith(_WRAPPERS):
        caller = caller.f_back
    return caller is not None and caller.f_globals.get("__name__") == "torch.autograd.graph"


class AttributedSaves(SavedTensors):
    """`SavedTensors` that also tells a timeline what is saved, and so by which layer."""

    def __init__(self, timeline: StepTimeline, *exclude: Any) -> None:
        super().__init__(*exclude)
        # Weakly: the graph of a loss holds on to this meter, and need not hold on to every event as well.
        self._timeline = weakref.ref(timeline)

    def _pack(self, tensor: Tensor) -> Any:
        saved = super()._pack(tensor)
        timeline = self._timeline()
        if timeline is not None:
            timeline.saved(saved.tensor, saved)
        return saved


def _storage_keys(args: tuple[Any, ...]) -> Iterator[int]:
    tensors = (tensor for tensor in tensors_in(args) if tensor.layout is torch.strided)
    return (tensor.untyped_storage()._cdata for tensor in tensors)


def _release(reference: "weakref.ref[StepTimeline]", key: int) -> None:
    timeline = reference()
    if timeline is not None and key in timeline._storages:
        storage = timeline._storages.pop(key)
        timeline.current[storage.category] -= storage.nbytes


def _let_go(reference: "weakref.ref[StepTimeline]", key: int) -> None:
    """Autograd freed a saved tensor; its storage may live on as an ordinary one."""
    timeline = reference()
    storage = timeline._storages.get(key) if timeline is not None else None
    if timeline is None or storage is None:
        return
    storage.keepers -= 1
    if storage.keepers == 0 and not storage.is_fixed:
        timeline._move(storage, "transients")
