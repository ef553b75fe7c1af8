"""The policy, and its layout over ranks."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from balcap_mega.config.schema.base import Positive, Section


class ModelConfig(Section):
    """The policy: a Hugging Face folder, or a small random one made on the spot for the CPU quickstart and tests."""

    path: str | None = None
    """Hugging Face folder that training starts from, or a model's id on the Hub: fetched once a host, its safetensors,
    JSON and tokenizer files alone, at a commit that becomes part of the run."""
    revision: str | None = None
    """Branch, tag or commit of a model of the Hub; null: its main branch, and when a run goes on, where it began."""
    tiny: str | None = None
    """Make a small random model of this family instead of reading `path`; a name in balcap_mega/models/families."""
    freeze_vision: bool = True
    """Leave the vision tower and its projector as they are."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of weights and activations. Master weights are float32, and so are gradients and moments unless `optimizer` says
    otherwise."""
    fp8: Literal["none", "hybrid", "e4m3"] = "none"
    """FP8 format of the decoder's linear layers; needs a GPU and Transformer Engine."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise"] = "blockwise"
    """How FP8 scales are chosen."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that backward computes again instead of keeping them."""
    attention: Literal["flash", "flex"] = "flash"
    """Kernels of the decoder's attention on a GPU in bfloat16; they round differently. `flex` is compiled, and computes
    float32 whatever stands here; a CPU has kernels of its own."""
    apply_rope_fusion: bool = False
    """Rotate queries and keys in one kernel of Transformer Engine's, in float32 up to the result; needs a GPU. Without
    it sines, cosines and products are rounded to `dtype`, as transformers does."""
    gradient_accumulation_fusion: bool = False
    """Let the GEMM that makes a weight's gradient add it to the sum over microbatches, unrounded; needs a GPU and
    Transformer Engine."""

    @model_validator(mode="after")
    def one_source(self):
        if (self.path is None) == (self.tiny is None):
            raise ValueError(
                f"path={self.path} and tiny={self.tiny}; set exactly one of model.path (a Hugging Face folder) and "
                "model.tiny (the name of a model family), the other to null"
            )
        return self

    @model_validator(mode="after")
    def fp8_beside_bfloat16(self):
        if self.fp8 != "none" and self.dtype != "bfloat16":
            raise ValueError(f"fp8={self.fp8} quantises bfloat16, not dtype={self.dtype}; set model.dtype=bfloat16")
        return self

    @model_validator(mode="after")
    def fusions_beside_bfloat16(self):
        for key in ("apply_rope_fusion", "gradient_accumulation_fusion"):
            if getattr(self, key) and self.dtype != "bfloat16":
                raise ValueError(
                    f"{key}=true: Transformer Engine's layers are for bfloat16, not dtype={self.dtype}; set "
                    f"model.{key}=false, or model.dtype=bfloat16"
                )
        return self


class ParallelConfig(Section):
    """Megatron layout; data parallelism is what remains of the world size."""

    tensor: Positive = 1
    """Ranks that share each layer."""
    pipeline: Positive = 1
    """Stages that the layers are split into."""
    sequence: bool = False
    """Also split norms and dropout, along the sequence, over the tensor-parallel ranks."""
    distributed_optimizer: bool = True
    """Split float32 weights and moments over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data-parallel ranks while the last microbatch's backward pass goes on, a bucket as soon as
    it is full. (Gathering the updated weights behind the next forward pass instead would hide nothing here: the refit
    reads them at once.)"""
    bucket_size: Positive | None = None
    """Parameters of a bucket, with overlap_grad_reduce=true; null: the larger of 40 million and a million for each
    data-parallel rank."""
    offload: Literal["auto", "always", "never"] = "auto"
    """Use the device's memory one after the other: the engine sleeps while the learner trains, and gradients and
    optimizer state leave the device while the engine generates. `auto`: on GPUs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: the GPU where there is one."""
    timeout_seconds: Positive = 540
    """End the run when no rank has finished anything for so long. The default is below the 600 s after which PyTorch
    aborts collectives."""
    silence_seconds: Annotated[int, Field(ge=5)] = 60
    """End the run when one rank has given no sign of life for so long."""

    @model_validator(mode="after")
    def buckets_are_reduced_one_by_one(self):
        if self.bucket_size is not None and not self.overlap_grad_reduce:
            raise ValueError(
                f"bucket_size={self.bucket_size}, but gradients are reduced all at once; set "
                "parallel.overlap_grad_reduce=true, or parallel.bucket_size=null"
            )
        return self

    @model_validator(mode="after")
    def sequence_needs_tensor(self):
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence=true needs tensor >= 2; set parallel.sequence=false or raise parallel.tensor")
        return self
