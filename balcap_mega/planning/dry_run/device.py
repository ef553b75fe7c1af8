"""A device without memory: what would run on a GPU runs on shapes alone, and is counted.

Its tensors are PyTorch's meta tensors, so host and device stay apart as they are in a run: what the host keeps (token
ids, segments, sizes of images) is real, and a step from the device to the host is seen as one. Integers that the
device computes from integers of the host are computed beside their shapes, since windows of the vision tower and the
places of image tokens depend on them. Large tensors of the host (pixels, offloaded state) are shapes too.
"""

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from balcap_mega.parallel import transfer
from balcap_mega.planning.dry_run.collectives import Collectives
from balcap_mega.planning.dry_run.ledger import Ledger
from balcap_mega.planning.dry_run.waits import Waits, called_from

META = torch.device("meta")
HOST_LIMIT = 2**20
"""Bytes above which a tensor of the host is a shape alone."""

KNOWN_LIMIT = 2**22
"""Elements up to which integers are computed."""

aten = torch.ops.aten
_FACTORIES = {aten.empty.memory_format, aten.zeros.default, aten.full.default, aten.ones.default}
_SIZED_BY_VALUES = {
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
}
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


def _fills(function, args) -> bool:
    """Whether a mask says where one number goes: on a GPU PyTorch fills without asking how many places these are."""
    if function is aten.index.Tensor or (len(args) > 3 and args[3]):
        return False
    masks = [index for index in args[1] if index is not None]
    return len(masks) == 1 and masks[0].dtype is torch.bool and args[2].numel() == 1


class UnknownValues(RuntimeError):
    """The program asks the device for what a dry run does not compute."""


class _Literals(TorchFunctionMode):
    """Numbers that Python puts on the device go there from the host: PyTorch would forget them."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if function is torch.tensor and args and isinstance(args[0], list):
            # Tensors in it would be read one by one, unseen here.
            args = (tree_map_only(Tensor, Tensor.item, args[0]), *args[1:])
        if function in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device) == META:
            return function(*args, **{**kwargs, "device": "cpu"}).to(META)
        return function(*args, **kwargs)


class DryDevice(TorchDispatchMode):
    """Inside it, `device` takes a device's part.

    ledger:  the device's memory
    host:    large tensors of the host
    flops:   by moment of the step, a multiply-add being two
    stand_ins: how often each has been called
    """

    device = META

    def __init__(self, granularity: int = 512):
        super().__init__()
        self.ledger, self.host = Ledger(granularity), Ledger(granularity)
        self.collectives, self.waits = Collectives(), Waits()
        self.flops: Counter[str] = Counter()
        self.stand_ins: Counter[str] = Counter()
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # of the device's tensors: their values on the host
        self._on_host: dict[int, weakref.ref] = {}  # storages that are shapes of the host's memory

    def __enter__(self):
        self._resize = torch.UntypedStorage.resize_
        torch.UntypedStorage.resize_ = self._resized
        self._literals = _Literals()
        self._literals.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        self._literals.__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize
        return super().__exit__(*error)

    @property
    def _resized(self) -> Callable:
        resize, ledger = self._resize, self.ledger

        def resized(storage, size):
            result = resize(storage, size)
            if storage.device == META:
                ledger.resized(storage)
            return result

        return resized

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "c10d":
            return self.collectives.run(function, args)
        values = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        device = kwargs.get("device")
        if not any(value.device == META for value in values) and (device is None or torch.device(device) != META):
            return self._on_the_host(function, args, kwargs)
        if function is aten._local_scalar_dense.default:
            self.waits.note(self.ledger.moment, "item")
            return self._value(args[0]).item()
        if function in _SIZED_BY_VALUES and kwargs.get("output_size") is None:
            self.waits.note(self.ledger.moment, function._opname)
            args, kwargs = tree_map_only(Tensor, self.known, (args, kwargs))
            return tree_map_only(Tensor, self._remember, function(*args, **kwargs))
        if function is aten.copy_.default:
            self._crosses(args[1], args[0], args[2] if len(args) > 2 else False)
            if args[0].device != META:
                return args[0].copy_(self._value(args[1]))
        if function is aten._to_copy.default and device is not None and torch.device(device) != META:
            return self._to_host(function, args, kwargs)
        if function is aten._to_copy.default and device is not None and self.is_host(args[0]):
            self._crosses(args[0], None, kwargs.get("non_blocking", False))
        fills = function in _INDEXING and _fills(function, args)
        if function in _INDEXING and not fills:
            args = (args[0], [self._places(index) for index in args[1]], *args[2:])
        known = self._compute(function, args, kwargs, values)
        if fills:
            result = torch.empty_like(args[0]) if function is aten.index_put.default else args[0]
        else:
            result = function(*args, **kwargs)
        self._count(function, args, kwargs, result)
        self._see(result, known, host=all(map(self.is_host, values)) and not device)
        return result

    # Values.

    def known(self, tensor: Tensor) -> Tensor:
        """The values of a tensor of the device. Raises UnknownValues for what depends on weights or pixels."""
        if tensor.device != META:
            return tensor
        if tensor not in self._known:
            raise UnknownValues("a shape depends on values of the device that a dry run does not compute")
        return self._known[tensor]

    def is_host(self, tensor: Tensor) -> bool:
        """Whether the tensor is the host's, be it a shape alone."""
        return tensor.device != META or tensor.untyped_storage()._cdata in self._on_host

    def is_host_shape(self, tensor: Tensor) -> bool:
        """Whether it is one of the host's that is a shape alone."""
        return tensor.device == META and self.is_host(tensor)

    def host_tensor(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor of the host; a large one is a shape alone."""
        return torch.empty(*shape, dtype=dtype)

    def _value(self, tensor: Tensor) -> Tensor:
        """Its values, or where they are not known something in their place: ones, or False."""
        if tensor.device == META and tensor not in self._known:
            return torch.full(tensor.shape, tensor.dtype != torch.bool, dtype=tensor.dtype, device="cpu")
        return self.known(tensor)

    def _compute(self, function, args, kwargs, values: list[Tensor]) -> Any:
        """The operator on known values, None where there are none."""
        if any(value.device == META and value not in self._known for value in values):
            return None
        if not values and kwargs.get("dtype") not in (torch.int64, torch.int32, torch.bool, None):
            return None
        if any(value.numel() > KNOWN_LIMIT or value.is_floating_point() for value in values):
            return None
        args, kwargs = tree_map_only(Tensor, self.known, (args, kwargs))
        if "device" in kwargs:
            kwargs = {**kwargs, "device": "cpu"}
        try:
            found = function(*args, **kwargs)
        except (RuntimeError, NotImplementedError):
            return None
        tensors = [value for value in tree_flatten(found)[0] if isinstance(value, Tensor)]
        small = all(not value.is_floating_point() and value.numel() <= KNOWN_LIMIT for value in tensors)
        return found if small else None

    def _remember(self, values: Tensor) -> Tensor:
        result = torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device=META)
        self._known[result] = values
        self.ledger.see(result)
        return result

    def _places(self, index: Tensor | None) -> Tensor | None:
        """A mask chooses as many rows as it has ones: the device is asked how many."""
        if index is None or index.dtype not in (torch.bool, torch.uint8) or index.device != META:
            return index
        self.waits.note(self.ledger.moment, "mask as index")
        return self.known(index)

    # The host's side.

    def _on_the_host(self, function, args, kwargs) -> Any:
        if function in _FACTORIES:
            shape = torch.empty(args[0], dtype=kwargs.get("dtype") or torch.get_default_dtype(), device=META)
            if shape.nbytes >= HOST_LIMIT:
                return self._hosted(shape)
        return function(*args, **kwargs)

    def _to_host(self, function, args, kwargs) -> Tensor:
        source = args[0]
        if self.is_host(source):
            if kwargs.get("dtype") in (None, source.dtype):
                return source  # which is there already, if only as a shape
        else:
            self.waits.note(self.ledger.moment, "copy to the host")
        if source in self._known or source.nbytes < HOST_LIMIT:
            return function(self._value(source), **kwargs)
        return self._hosted(torch.empty_like(source, dtype=kwargs.get("dtype"), device=META))

    def _crosses(self, source: Tensor, target: Tensor | None, non_blocking: bool) -> None:
        """A copy between host and device waits for what the device has in hand, unless told not to."""
        to_host = target is not None and self.is_host(target)
        if called_from(transfer.__file__):
            return  # on a GPU through pinned memory
        if not non_blocking and self.is_host(source) != to_host:
            self.waits.note(self.ledger.moment, "copy to the host" if to_host else "copy to the device")

    def _hosted(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        self._on_host[key] = weakref.ref(storage, lambda _: self._on_host.pop(key, None))
        self.host.see(tensor)
        return tensor

    # Accounts.

    def _see(self, result: Any, known: Any, host: bool) -> None:
        values, _ = tree_flatten(result)
        beside = tree_flatten(known)[0] if known is not None else [None] * len(values)
        for value, of_host in zip(values, beside):
            if not isinstance(value, Tensor) or value.device != META:
                continue
            if of_host is not None:
                self._known[value] = of_host
            elif value in self._known:
                del self._known[value]  # written over
            if self.is_host(value):
                continue
            if host:
                self._hosted(value)
            else:
                self.ledger.see(value)

    def _count(self, function, args, kwargs, result) -> None:
        if formula := flop_registry.get(function._overloadpacket):
            self.add_flops(formula(*args, **kwargs, out_val=result))

    def add_flops(self, flops: float) -> None:
        self.flops[self.ledger.moment] += flops

    def start_counting(self) -> None:
        """Forget what was done so far; memory stays as it is."""
        self.flops.clear()
        self.collectives.clear()
        self.waits.count.clear()
        self.stand_ins.clear()
        self.ledger.peaks.clear()
