"""One layer of a model in vLLM, laid out as a checkpoint fills it or as its kernels compute with it.

vLLM records how each layer looked when it was loaded, for reloading a whole model layer by layer. A refit uses the same
records and functions, for the layers and in the order in which weights arrive. Importing this module imports vLLM.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import _copy_and_restore_kernel_tensors, get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import restore_layer_on_meta
from vllm.model_executor.model_loader.reload.utils import get_layer_params_buffers

DERIVED = ".weight_scale"
"""How names end of parameters that no checkpoint has: vLLM's quantisation computes them from a weight, see `derive`."""

Allocate = Callable[[int, torch.dtype], Tensor]
"""(elements, dtype) -> an uninitialised vector of them, on the model's device."""


def loaded_elements(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Each parameter's name, and how many of its elements a checkpoint fills: not the padding of a vocabulary."""
    for name, live in model.named_parameters():
        layer, _, own_name = name.rpartition(".")
        module = model.get_submodule(layer)
        parameter = _as_loaded(module).get(own_name, live)
        if isinstance(module, VocabParallelEmbedding):
            yield name, module.shard_indices.num_org_elements * parameter[0].numel()
        else:
            yield name, parameter.numel()


def is_converted(module: nn.Module) -> bool:
    """Whether a parameter of this layer no longer has the shape and the dtype that it was loaded with."""
    live = dict(module.named_parameters(recurse=False))
    return any(
        name in live and (live[name].shape != tensor.shape or live[name].dtype != tensor.dtype)
        for name, tensor in _as_loaded(module).items()
    )


def lay_out(module: nn.Module, allocate: Allocate) -> None:
    """Give the layer parameters to write into as on loading, in memory from `allocate`; its kernels' are set aside."""
    info = get_layerwise_info(module)
    info.kernel_tensors = get_layer_params_buffers(module)
    info.kernel_non_persistent_buffers = set(module._non_persistent_buffers_set)
    restore_layer_on_meta(module, info)
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.is_meta:
            loadable = allocate(parameter.numel(), parameter.dtype).view(parameter.shape)
            loadable.__class__ = parameter.__class__
            loadable.__dict__ = parameter.__dict__.copy()  # pyright: ignore[reportAttributeAccessIssue] (not final)
            setattr(module, name, loadable)


def put_back(module: nn.Module) -> list[Tensor]:
    """Pack or quantise what was written since `lay_out`, into the tensors that the layer's kernels read, in place.

    Returns the vectors that `lay_out` allocated, of which the layer has no more need.
    """
    info = get_layerwise_info(module)
    written = [getattr(module, name) for name in _as_loaded(module)]
    derive(module)
    free = [memory.data.flatten() for memory in written]
    _copy_and_restore_kernel_tensors(module, info)
    info.reset()
    return free


def derive(module: nn.Module) -> None:
    """Do what vLLM does once a layer is loaded: pack its weight, or quantise it."""
    method = getattr(module, "quant_method", None)
    if method is not None:
        # Quantisation methods remember that they ran once.
        module.__dict__.pop("_already_called_process_weights_after_loading", None)
        method.process_weights_after_loading(module)


def _as_loaded(module: nn.Module) -> dict[str, Tensor]:
    """The layer's own parameters as they were loaded: shapes and dtypes, on the meta device."""
    parameters, _buffers = get_layerwise_info(module).restore_metadata
    return parameters
