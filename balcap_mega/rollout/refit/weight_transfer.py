"""The engine's side of a refit: a backend of vLLM's weight-transfer interface that writes into parameters in place.

Importing this module imports vLLM; the engine names it by its path (`WEIGHT_TRANSFER` in `balcap_mega.rollout.engine`).
"""

import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from balcap_mega.errors import UserError
from balcap_mega.rollout.refit.pieces import CorruptPieces, Write, checksums, rectangle
from balcap_mega.rollout.vllm_runtime import reload
from balcap_mega.rollout.vllm_runtime.backend import (
    WeightTransferBackend,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)


class Unaccounted(UserError):
    """The engine has parameters that the refit's tables do not list, or the other way round."""


@dataclass
class InPlaceInitInfo(WeightTransferInitInfo):
    """What the updates will bring.

    target_elements: by parameter, how many of its elements every update writes
    kept_elements:   by parameter, how many keep the loaded value, since the trainer does not change them
    dtype:           of the values that are sent
    """

    target_elements: dict[str, int]
    kept_elements: dict[str, int]
    dtype: torch.dtype


@dataclass
class InPlaceUpdateInfo(WeightTransferUpdateInfo):
    """One bucket. checksums: [len(writes), 2] as the trainer computed them, or None to trust what arrives."""

    writes: list[Write]
    checksums: Tensor | None = None


class InPlaceWeightTransfer(WeightTransferBackend[InPlaceInitInfo, InPlaceUpdateInfo]):
    """Copies rectangles into the model's parameters, then has vLLM derive again what it derives from them.

    Some layers compute with another tensor than the one that was loaded: a linear packed for the CPU or quantised to
    FP8. Such a layer gets parameters again like those that were loaded. Once these are written, its own quantisation
    method processes them as on loading, and the result is copied to where the engine's kernels expect it. Only one
    layer for each sending pipeline stage is in that state at a time, and the next layer uses the same memory.
    """

    init_info_cls = InPlaceInitInfo
    update_info_cls = InPlaceUpdateInfo

    def init_transfer_engine(self, init_info: InPlaceInitInfo) -> None:
        """Raises Unaccounted where the engine computes with anything but what updates write and what is kept."""
        _account(self.model, Counter(init_info.target_elements) + Counter(init_info.kept_elements))
        self._elements: dict[str, int] = defaultdict(int)
        for name, elements in init_info.target_elements.items():
            self._elements[_layer_of(name)] += elements
        self._sharing = _layers_by_parameter(self.model)
        self._device = next(self.model.parameters()).device
        self._dtype = init_info.dtype
        self._scratch: list[Tensor] = []

    def start_weight_update(self) -> None:
        self._missing = dict(self._elements)
        self._laid_out: set[str] = set()
        self.finalise_seconds = 0.0

    def write(self, update_info: InPlaceUpdateInfo) -> None:
        """Write one bucket. Raises CorruptPieces where a checksum differs."""
        if not update_info.writes:  # a band of rows that other ranks' engines have
            return
        for layer in {_layer_of(write.place.parameter) for write in update_info.writes} - self._laid_out:
            module = self.model.get_submodule(layer)
            if reload.is_converted(module):
                reload.lay_out(module, self._take_scratch)
                self._laid_out.add(layer)
        parameters = {write.place.parameter for write in update_info.writes}
        tensors = {name: self.model.get_parameter(name) for name in parameters}
        targets = [rectangle(tensors[write.place.parameter], write.place) for write in update_info.writes]
        torch._foreach_copy_(targets, [write.values for write in update_info.writes])
        if update_info.checksums is not None:
            self._check(update_info.writes, targets, update_info.checksums)
        for write in update_info.writes:
            self._missing[_layer_of(write.place.parameter)] -= write.values.numel()
        # In one order on all ranks of an engine: to quantise a weight cut along its inputs, vLLM asks the other ranks.
        for layer in sorted({_layer_of(write.place.parameter) for write in update_info.writes}):
            if self._missing[layer] == 0:
                self._process(layer)

    def finish_weight_update(self) -> None:
        """Raises ValueError where a layer did not get all its weights."""
        if self._device.type == "cuda":  # whose allocator hands it out again at no cost; a CPU's would fault in pages
            self._scratch = []
        unfinished = [layer for layer, elements in self._missing.items() if elements]
        if unfinished:
            raise ValueError(f"{len(unfinished)} layers got only part of their weights, the first is {unfinished[0]}")

    def _take_scratch(self, elements: int, dtype: torch.dtype) -> Tensor:
        """Memory that an earlier layer no longer needs, as new memory costs more than the copy into it."""
        for place, memory in enumerate(self._scratch):
            if memory.numel() == elements and memory.dtype == dtype:
                return self._scratch.pop(place)
        return torch.empty(elements, dtype=dtype, device=self._device)

    def _process(self, layer: str) -> None:
        start = time.perf_counter()
        module = self.model.get_submodule(layer)
        if layer in self._laid_out:
            self._scratch += reload.put_back(module)
        else:
            for sharing in self._sharing.get(layer, ()):  # the layer itself, and a head tied to its embedding
                reload.derive(sharing)
        self.finalise_seconds += time.perf_counter() - start

    def _check(self, writes: list[Write], targets: list[Tensor], expected: Tensor) -> None:
        wrong = (checksums(targets, self._dtype) != expected).any(dim=1).nonzero().flatten().tolist()
        if wrong:
            raise CorruptPieces(
                f"{len(wrong)} of {len(writes)} pieces are not what the trainer sent, the first is "
                f"{writes[wrong[0]].place}"
            )


def _account(model: nn.Module, known: Mapping[str, int]) -> None:
    """Every parameter that the model computes with is known whole, or derived from one that is."""
    loaded = dict(reload.loaded_elements(model))
    known = {name: known.get(name, 0) for name in loaded.keys() | known.keys() if not name.endswith(reload.DERIVED)}
    problems = {
        "no update reaches": [name for name in known if not known[name] and loaded[name]],
        "the engine does not have": [name for name in known if name not in loaded],
        "of another size": [name for name in known if 0 < known[name] != loaded.get(name, known[name])],
    }
    found = "; ".join(f"{what}: {', '.join(sorted(names)[:4])}" for what, names in problems.items() if names)
    if found:
        raise Unaccounted(
            f"the engine's parameters are not those of the trainer ({found})",
            remedy="use a checkpoint whose config.json describes its weights: launch/check_model.py holds one against "
            "transformers",
        )


def _layer_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _layers_by_parameter(model: nn.Module) -> dict[str, list[nn.Module]]:
    """For each layer, all modules that compute with one of its own parameters."""
    users: dict[int, list[nn.Module]] = defaultdict(list)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)].append(module)
    return {
        name: list({id(user): user for p in module.parameters(recurse=False) for user in users[id(p)]}.values())
        for name, module in model.named_modules()
    }
