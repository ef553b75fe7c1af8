"""What a Hugging Face folder's config.json says about a policy, typed; and the Megatron config that follows from it.

What all families have in common is read here, what is particular to one by its `Family`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from megatron.core.transformer.transformer_config import TransformerConfig
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import AutoConfig, PretrainedConfig

from balcap_mega.config.schema import ModelConfig, ParallelConfig
from balcap_mega.errors import UserError
from balcap_mega.models.families import FAMILIES
from balcap_mega.models.families.interface import Decoder, Family
from balcap_mega.parallel.gradients import finalize_gradients
from balcap_mega.parallel.platform import Platform

# What transformers raises on values that it checks, and on those it does not check but computes with.
MALFORMED = (ArithmeticError, AttributeError, LookupError, OSError, StrictDataclassError, TypeError, ValueError)

Size = Annotated[int, Field(ge=1, le=2**24)]
Depth = Annotated[int, Field(ge=1, le=1024)]


class _Sizes(BaseModel):
    """Numbers of a config.json that something is allocated or counted by; where they are absent, defaults hold."""

    model_config = ConfigDict(strict=True)

    num_hidden_layers: Depth = 1
    depth: Depth = 1
    hidden_size: Size = 1
    intermediate_size: Size = 1
    num_attention_heads: Size = 1
    num_heads: Size = 1
    num_key_value_heads: Size = 1
    vocab_size: Size = 1
    max_position_embeddings: Size = 1
    max_window_layers: Annotated[int, Field(ge=0, le=1024)] = 1
    head_dim: Size | None = None
    image_size: Size = 1
    patch_size: Size = 1
    temporal_patch_size: Size = 1
    spatial_merge_size: Size = 1
    in_channels: Size = 1
    num_channels: Size = 1
    out_hidden_size: Size = 1


class _ConfigFile(_Sizes):
    model_type: str = ""
    text_config: _Sizes = _Sizes()
    vision_config: _Sizes = _Sizes()


@dataclass(frozen=True)
class Architecture:
    """Sizes of the language model, in Hugging Face's terms, and what else its family makes of its config.json.

    family:    None for a language model alone, which the planner knows
    head_dim:  channels of one attention head
    config:    the whole transformers config, from which the family builds its vision tower
    """

    family: Family | None
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    decoder: Decoder
    tie_word_embeddings: bool
    image_token_id: int
    config: PretrainedConfig

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Architecture":
        """Read `folder/config.json`. Raises UserError for a missing file or a model that this policy cannot be."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise UserError(f"model.path={folder} holds no config.json", remedy="point it at a Hugging Face folder")
        try:
            model_type = _ConfigFile.model_validate_json(path.read_bytes()).model_type
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise UserError(f"{path}: {key}: {first['msg']}", remedy="download the checkpoint again") from error
        if model_type not in FAMILIES:
            known = " or ".join(f"{family.title} ({name})" for name, family in FAMILIES.items())
            raise UserError(
                f"{path}: model_type={model_type!r} is not a policy this framework trains",
                remedy=f"use a {known} checkpoint",
            )
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            return cls._from_config(path, FAMILIES[model_type], config)
        except MALFORMED as error:
            raise UserError(
                f"{path} is no whole configuration of a {model_type} model ({error})",
                remedy="download the checkpoint again",
            ) from error

    @classmethod
    def _from_config(cls, path: Path, family: Family, config: PretrainedConfig) -> "Architecture":
        text = config.text_config
        rope = text.rope_parameters
        requirements = {  # what every released checkpoint of any family is; others would be computed wrongly
            "text_config.model_type": (text.model_type, family.text_models),
            "text_config.hidden_act": (text.hidden_act, ("silu",)),
            "rope_type": (rope.get("rope_type", "default"), ("default", "mrope")),
            "use_sliding_window": (getattr(text, "use_sliding_window", False), (False,)),
            "mlp_bias": (getattr(text, "mlp_bias", False), (False,)),
            "text_config.attention_bias": (getattr(text, "attention_bias", False), (False,)),
            "layer_types": (set(getattr(text, "layer_types", None) or ()), (set(), {"full_attention"})),
            "partial_rotary_factor": (_anywhere("partial_rotary_factor", 1.0, rope, vars(text), vars(config)), (1.0,)),
            "logit_scale": (_anywhere("logit_scale", 1.0, vars(text), vars(config)), (1.0,)),
            "quantization_config": (getattr(config, "quantization_config", None), (None,)),
            **{key: (value, (0.0,)) for key, value in _dropouts(config).items()},
        }
        for key, (value, supported) in (requirements | family.requirements(config)).items():
            if value not in supported:
                raise UserError(
                    f"{path}: {key}={value!r} is not supported",
                    remedy=f"use a checkpoint where it is {' or '.join(map(repr, supported))}",
                )
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(
            family=family,
            num_layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            ffn_hidden_size=text.intermediate_size,
            num_attention_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads,
            head_dim=head_dim,
            vocab_size=text.vocab_size,
            max_position_embeddings=text.max_position_embeddings,
            rms_norm_eps=text.rms_norm_eps,
            rope_theta=rope["rope_theta"],
            decoder=family.decoder(config),
            tie_word_embeddings=bool(config.tie_word_embeddings),
            image_token_id=config.image_token_id,
            config=config,
        )

    def padded_vocab_size(self, tensor_size: int) -> int:
        """Rows of the embedding and the head: the vocabulary, padded to a multiple of the tensor-parallel size."""
        return -(-self.vocab_size // tensor_size) * tensor_size

    def layers_per_stage(self, pipeline_size: int) -> list[int]:
        """Decoder layers of each pipeline stage.

        A remainder goes to the middle stages, then to the last, then to the first: the first also runs the vision
        tower, the last also the head.
        """
        layers, remainder = divmod(self.num_layers, pipeline_size)
        order = [*range(1, pipeline_size - 1), pipeline_size - 1, 0]
        takes_one_more = set(order[:remainder])
        return [layers + (stage in takes_one_more) for stage in range(pipeline_size)]

    def check_layout(self, config: ParallelConfig) -> None:
        """Refuse a layout this model cannot be cut into. Raises UserError, before anything is allocated."""
        tensor, pipeline = config.tensor, config.pipeline
        if self.num_attention_heads % tensor:
            raise UserError(
                f"parallel.tensor={tensor} does not divide the model's {self.num_attention_heads} attention heads",
                remedy=f"use one of {_divisors(self.num_attention_heads)}",
            )
        if self.num_kv_heads % tensor and tensor % self.num_kv_heads:
            raise UserError(
                f"parallel.tensor={tensor} and the model's {self.num_kv_heads} key/value heads: neither divides the "
                "other",
                remedy=f"use one of {_divisors(self.num_kv_heads)}, or a multiple of {self.num_kv_heads}",
            )
        if self.ffn_hidden_size % tensor or self.hidden_size % tensor:
            raise UserError(
                f"parallel.tensor={tensor} does not divide the model's hidden_size={self.hidden_size} and "
                f"intermediate_size={self.ffn_hidden_size}",
                remedy="use a smaller power of two",
            )
        if pipeline > self.num_layers:
            raise UserError(
                f"parallel.pipeline={pipeline} is more than the model's {self.num_layers} layers",
                remedy=f"use at most {self.num_layers}",
            )
        first_stage = self.layers_per_stage(pipeline)[0]
        if first_stage < self.decoder.deepstack:
            fits = [size for size in range(1, pipeline) if self.layers_per_stage(size)[0] >= self.decoder.deepstack]
            raise UserError(
                f"parallel.pipeline={pipeline} leaves {first_stage} of the model's {self.num_layers} layers to the "
                f"first stage, and image features are added behind each of the first {self.decoder.deepstack}",
                remedy=f"set parallel.pipeline to at most {max(fits)}",
            )

    def transformer_config(
        self, model: ModelConfig, parallel: ParallelConfig, platform: Platform, **extra: Any
    ) -> TransformerConfig:
        """Megatron's config for this model under that layout, on that device; `extra` are more of its fields."""
        dtype = platform.dtype(model.dtype)
        stages = self.layers_per_stage(parallel.pipeline)
        options = {}
        if parallel.pipeline > 1:
            options |= {
                "pipeline_model_parallel_layout": _stage_layout(stages),
                "pipeline_dtype": dtype,
                "variable_seq_lengths": True,
                "moe_token_dispatcher_type": "alltoall",  # no experts here, but the default is refused with it
            }
        if model.recompute == "full":
            options |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        elif model.recompute == "selective":
            options |= {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
        return TransformerConfig(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_kv_heads,
            kv_channels=self.head_dim,
            normalization="RMSNorm",
            layernorm_epsilon=self.rms_norm_eps,
            activation_func=torch.nn.functional.silu,
            gated_linear_unit=True,
            add_bias_linear=False,
            add_qkv_bias=self.decoder.qkv_bias,
            qk_layernorm=self.decoder.qk_norm,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            sequence_parallel=parallel.sequence,
            params_dtype=dtype,
            bf16=dtype is torch.bfloat16,
            use_cpu_initialization=not platform.is_cuda,
            # Weights always come from a checkpoint; Megatron's initialisation still has to mark which ones TP cuts.
            init_method=_leave_as_allocated,
            output_layer_init_method=_leave_as_allocated,
            gradient_accumulation_fusion=False,  # by APEX; Transformer Engine's is `fuse_gradient_accumulation`
            bias_activation_fusion=platform.is_cuda,
            bias_dropout_fusion=platform.is_cuda,
            masked_softmax_fusion=False,
            persist_layer_norm=False,
            apply_rope_fusion=model.apply_rope_fusion,
            calculate_per_token_loss=True,
            finalize_model_grads_func=finalize_gradients,
            **options,
            **extra,
        )


def _anywhere(key: str, default: Any, *places: Mapping[str, Any]) -> Any:
    """The first value other than `default` that a place gives for `key`."""
    return next((place[key] for place in places if place.get(key, default) != default), default)


def _dropouts(config: PretrainedConfig) -> dict[str, Any]:
    """Every key of the model and its sections that speaks of dropout: no decoder here has any, a tower would."""
    sections = {"": config, "text_config.": config.text_config, "vision_config.": config.vision_config}
    return {
        prefix + key: value
        for prefix, section in sections.items()
        for key, value in vars(section).items()
        if "dropout" in key or key.endswith("_pdrop")
    }


def _leave_as_allocated(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _stage_layout(layers: list[int]) -> list[list[str]]:
    stages = [["decoder"] * count for count in layers]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages


def _divisors(number: int) -> str:
    return ", ".join(str(divisor) for divisor in range(1, number + 1) if number % divisor == 0)
