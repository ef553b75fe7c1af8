"""The engine's side of a refit: a backend of vLLM's weight-transfer interface that writes into parameters in place.

Importing this module imports vLLM; the engine names it by its path (`WEIGHT_TRANSFER` in `balcap_mega.rollout.engine`).
"""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import _copy_and_restore_kernel_tensors, get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import restore_layer_on_meta
from vllm.model_executor.model_loader.reload.utils import get_layer_params_buffers

from balcap_mega.errors import UserError
from balcap_mega.rollout.refit.pieces import CorruptPieces, Write, checksums, rectangle

DERIVED = ".weight_scale"
"""What vLLM's quantisation makes of a weight, whenever one is written; see `_derive`."""


class Unaccounted(UserError):
    """The engine has parameters that the refit's tables do not list, or the other way round."""


@dataclass
class InPlaceInitInfo(WeightTransferInitInfo):
    """Of each parameter, by how many elements.

    target_elements: written by every update
    kept_elements:   left as they were loaded, since the trainer does not change them
    dtype:           in what they are sent
    """

    target_elements: dict[str, int]
    kept_elements: dict[str, int]
    dtype: torch.dtype


@dataclass
class InPlaceUpdateInfo(WeightTransferUpdateInfo):
    """One bucket. checksums: [len(writes), 2] as the trainer computed them, or None to trust what arrives."""

    writes: list[Write]
    checksums: Tensor | None = None


class InPlaceWeightTransfer(WeightTransferEngine[InPlaceInitInfo, InPlaceUpdateInfo]):
    """Copies rectangles into the model's parameters, then has vLLM derive again what it derives from them.

    Where vLLM computes with something else than the parameter that was loaded, a linear packed for the CPU or quantised
    to FP8, that parameter is there no more: such a layer is laid out again as it was for loading, filled, processed by
    its own quantisation method as on loading, and what comes out is copied to where the engine's kernels expect it. Few
    layers are in this state at a time, one for each pipeline stage that sends; they take turns in the same memory.

    `finalise_seconds` is what that processing took during the last update, which is no transfer of weights.
    """

    init_info_cls = InPlaceInitInfo
    update_info_cls = InPlaceUpdateInfo
    supports_draft_weight_update = False
    trainer_send_weights = None  # vLLM 0.24 wants one; what sends here is `Refit`

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
        self.finalise_seconds = 0.0

    def start_weight_update(self) -> None:
        self._missing = dict(self._elements)
        self._laid_out: set[str] = set()
        self.finalise_seconds = 0.0

    def receive_weights(self, update_info: InPlaceUpdateInfo, load_weights: None = None) -> None:
        """Write one bucket. Raises CorruptPieces where a checksum differs. (`load_weights` is vLLM 0.24's, unused.)"""
        if not update_info.writes:  # a band of rows that other ranks' engines have
            return
        for layer in {_layer_of(write.place.parameter) for write in update_info.writes} - self._laid_out:
            if self._is_converted(layer):
                self._lay_out(layer)
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

    def shutdown(self) -> None:
        pass

    def _is_converted(self, layer: str) -> bool:
        """Whether a weight of this layer is no longer as it was loaded."""
        module = self.model.get_submodule(layer)
        loaded, _ = get_layerwise_info(module).restore_metadata
        live = dict(module.named_parameters(recurse=False))
        return any(
            name in live and (live[name].shape != tensor.shape or live[name].dtype != tensor.dtype)
            for name, tensor in loaded.items()
        )

    def _lay_out(self, layer: str) -> None:
        module = self.model.get_submodule(layer)
        info = get_layerwise_info(module)
        info.kernel_tensors = get_layer_params_buffers(module)
        info.kernel_non_persistent_buffers = set(module._non_persistent_buffers_set)
        restore_layer_on_meta(module, info)
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                memory = self._take_scratch(parameter.numel(), parameter.dtype)
                loadable = memory.view(parameter.shape)
                loadable.__class__, loadable.__dict__ = parameter.__class__, parameter.__dict__.copy()
                setattr(module, name, loadable)
        self._laid_out.add(layer)

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
            info = get_layerwise_info(module)
            scratch = [getattr(module, name) for name in info.restore_metadata[0]]
            _derive(module)
            self._scratch += [memory.data.flatten() for memory in scratch]
            _copy_and_restore_kernel_tensors(module, info)
            info.reset()
        else:
            for sharing in self._sharing.get(layer, ()):  # the layer itself, and a head tied to its embedding
                _derive(sharing)
        self.finalise_seconds += time.perf_counter() - start

    def _check(self, writes: list[Write], targets: list[Tensor], expected: Tensor) -> None:
        wrong = (checksums(targets, self._dtype) != expected).any(dim=1).nonzero().flatten().tolist()
        if wrong:
            raise CorruptPieces(
                f"{len(wrong)} of {len(writes)} pieces are not what the trainer sent, the first is "
                f"{writes[wrong[0]].place}"
            )


class RefitWorker:
    """What vLLM's worker can do for a refit beside its own methods; the engine names it as `worker_extension_cls`.

    The worker of vLLM 0.24 asks for the format of the weights, and keeps start and finish to itself.
    """

    def start_refit(self) -> None:
        if _WORKER_TELLS_ENGINE:
            self.start_weight_update()
        else:
            self.start_weight_update(is_checkpoint_format=False)
            self.weight_transfer_engine.start_weight_update()

    def finish_refit(self) -> float:
        """Returns the update's `finalise_seconds`."""
        self.finish_weight_update()
        if not _WORKER_TELLS_ENGINE:
            self.weight_transfer_engine.finish_weight_update()
        return self.weight_transfer_engine.finalise_seconds


_WORKER_TELLS_ENGINE = hasattr(WeightTransferEngine, "start_weight_update")


def _account(model: nn.Module, known: Mapping[str, int]) -> None:
    """Every parameter that the model computes with is known whole, or derived from one that is."""
    loaded = dict(_loaded_elements(model))
    known = {name: known.get(name, 0) for name in loaded.keys() | known.keys() if not name.endswith(DERIVED)}
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


def _loaded_elements(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Each parameter with the elements that a checkpoint gives it: the padding of a vocabulary is none."""
    for name, live in model.named_parameters():
        module = model.get_submodule(_layer_of(name))
        loaded, _ = get_layerwise_info(module).restore_metadata
        parameter = loaded.get(name.rpartition(".")[2], live)
        if isinstance(module, VocabParallelEmbedding):
            yield name, module.shard_indices.num_org_elements * parameter[0].numel()
        else:
            yield name, parameter.numel()


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


def _derive(module: nn.Module) -> None:
    """What vLLM does after loading a layer: pack or quantise."""
    method = getattr(module, "quant_method", None)
    if method is not None:
        # Quantisation methods remember that they ran once.
        module.__dict__.pop("_already_called_process_weights_after_loading", None)
        method.process_weights_after_loading(module)
