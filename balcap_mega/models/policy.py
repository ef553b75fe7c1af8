"""The policy: a vision tower from transformers in front of a Megatron-Core language model.

Parameter names (what checkpoints and resharding map from and to):

    vision.*                    the family's vision tower and projector, transformers' names; first pipeline stage only
    language_model.embedding.word_embeddings.weight            [padded_vocab / TP, H]; first stage
    language_model.decoder.layers.{i}.self_attention.linear_qkv.{weight,bias}      i counts from 0 in each stage
    language_model.decoder.layers.{i}.self_attention.{q,k}_layernorm.weight    [head_dim], where the family has them
    language_model.decoder.layers.{i}.self_attention.linear_proj.weight
    language_model.decoder.layers.{i}.mlp.linear_fc1.weight    gate and up, [2 * F / TP, H]
    language_model.decoder.layers.{i}.mlp.linear_fc2.weight
    language_model.decoder.layers.{i}.input_layernorm.weight       with Transformer Engine linears:
                                                                   self_attention.linear_qkv.layer_norm_weight
    language_model.decoder.layers.{i}.pre_mlp_layernorm.weight     with Transformer Engine linears:
                                                                   mlp.linear_fc1.layer_norm_weight
    language_model.decoder.final_layernorm.weight              last stage
    language_model.output_layer.weight                         [padded_vocab / TP, H]; last stage; where embeddings are
                                                               tied: absent at PP1, a copy kept in step at PP > 1

Vision parameters are whole on every tensor-parallel rank. `linear_qkv` interleaves by key/value head: its heads'
queries, then the key, then the value; with fewer key/value heads than TP ranks that layout is cut evenly all the same.
"""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from balcap_mega.config.schema import ModelConfig, ParallelConfig
from balcap_mega.models.architecture import Architecture
from balcap_mega.models.fp8 import check_fp8, check_fp8_machine, fp8_options
from balcap_mega.models.fusions import fuse_gradient_accumulation
from balcap_mega.models.layer_specs import block_spec, transformer_engine_version
from balcap_mega.models.rotary import MultimodalRotary
from balcap_mega.models.vision import VisionInputs, VisionTower, encode_images
from balcap_mega.parallel.gradients import PARTIAL_OVER_TENSOR_PARALLEL
from balcap_mega.parallel.groups import process_grid
from balcap_mega.parallel.platform import Platform, calls_megatron
from balcap_mega.parallel.transfer import to_device

Objective = Callable[[Tensor, Tensor], Any]
"""(hidden [R, H], head weight [padded_vocab / TP, H]) -> whatever the last stage shall return.

Its backward must give this rank's own part of d-hidden, that of its vocabulary slice: the policy sums over TP.
Rows of the weight at and above `Architecture.vocab_size` are padding and must be left out.
"""


class LanguageModel(GPTModel):
    """Megatron's GPTModel whose last stage hands hidden states to an objective instead of making logits.

    Its rotary embedding is ours, and `deepstack` features ride through the decoder as Megatron's `context`, whose
    gradient survives recomputation; layers that are no `DeepstackLayer` leave it alone.
    """

    def __init__(self, architecture: Architecture, *arguments, **options):
        super().__init__(*arguments, position_embedding_type="none", **options)
        self.rotary_pos_emb = MultimodalRotary(architecture.decoder, architecture.head_dim, architecture.rope_theta)

    def embed(self, tokens: Tensor) -> Tensor:
        """[1, S] ids -> [S, 1, H] embeddings of all S tokens, on every tensor-parallel rank."""
        return self.embedding(input_ids=tokens, position_ids=None)

    def forward(
        self,
        embeddings: Tensor | None,
        deepstack: Tensor | None,
        position_ids: Tensor,
        segments: Tensor,
        hidden_rows: Tensor,
        objective: Objective,
    ) -> Tensor:
        """Hidden states for the next stage, or on the last one the objective's value (see `VisionLanguagePolicy`)."""
        hidden = self.decoder(
            hidden_states=embeddings,  # None after the first stage: the schedule has set the input tensor
            attention_mask=segments,
            context=deepstack,
            rotary_pos_emb=self.rotary_pos_emb(position_ids),
        )
        if not self.post_process:
            return hidden
        # Backward of either adds up, over TP, what each rank's vocabulary slice contributes to d-hidden.
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden)
        return objective(hidden[:, 0].index_select(0, hidden_rows), self.head_weight())

    def head_weight(self) -> Tensor:
        """This rank's [padded_vocab / TP, H] slice of the LM head; the embedding's own where they are tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight  # pyright: ignore[reportReturnType] (the last stage has one)


class VisionLanguagePolicy(MegatronModule):
    """One pipeline stage of the policy. Build it with `build_policy`, then load weights, then wrap it for training."""

    def __init__(
        self,
        architecture: Architecture,
        config: TransformerConfig,
        *,
        freeze_vision: bool,
        transformer_engine: bool,
        attention: str,
    ):
        super().__init__(config)
        grid = process_grid()
        self.architecture = architecture
        self.model_type = ModelType.encoder_or_decoder  # read by Megatron's schedules
        self.pre_process, self.post_process = grid.is_first_stage, grid.is_last_stage
        self.share_embeddings_and_output_weights = architecture.tie_word_embeddings
        self.freeze_vision = freeze_vision
        self.transformer_engine = transformer_engine
        self._frozen_embeddings: WeakKeyDictionary[VisionInputs, Tensor] = WeakKeyDictionary()
        self.vision = build_vision_tower(architecture, config.params_dtype) if grid.is_first_stage else None
        if self.vision is not None:
            for parameter in self.vision.parameters():
                parameter.requires_grad_(parameter.requires_grad and not freeze_vision)
                setattr(parameter, PARTIAL_OVER_TENSOR_PARALLEL, True)  # each TP rank encodes its share of the images
        self.language_model = LanguageModel(
            architecture,
            config,
            block_spec(config, architecture.decoder, transformer_engine=transformer_engine, attention=attention),
            vocab_size=architecture.padded_vocab_size(grid.tensor_size),
            max_sequence_length=architecture.max_position_embeddings,
            pre_process=self.pre_process,
            post_process=self.post_process,
            share_embeddings_and_output_weights=architecture.tie_word_embeddings,
            scatter_embedding_sequence_parallel=False,  # image embeddings go in first
        )

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        segments: Tensor,
        hidden_rows: Tensor,
        objective: Objective,
        images: Sequence[VisionInputs] = (),
    ) -> Tensor:
        """Run this stage on one packed row (see `packing.rows.PackedRow`); every TP rank passes the same arguments.

        tokens:       [1, S] int64, on the host: there image tokens are found without a wait for the device; under
                      sequence parallelism S is a multiple of the tensor-parallel size
        position_ids: [3, 1, S] int64
        segments:     [M, 4] int32 on the host, which tokens attend to which
        hidden_rows:  [R] int64, the rows of hidden states that the objective reads
        objective:    called on the last stage only; its result is returned there
        images:       the images of the row's runs of image tokens, in order; one that appears again is encoded once
        """
        embeddings, deepstack = self._embed(tokens, images) if self.pre_process else (None, None)
        return self.language_model(embeddings, deepstack, position_ids, segments, hidden_rows, objective)

    def _embed(self, tokens: Tensor, images: Sequence[VisionInputs]) -> tuple[Tensor, Tensor | None]:
        """[1, S] ids -> [S, 1, H] embeddings with images in place; [S / TP, 1, H] under sequence parallelism.

        And what `DeepstackLayer` adds, zero where no image stands: [layers, S, 1, H], or cut over TP likewise.
        """
        device = self.language_model.embedding.word_embeddings.weight.device
        embeddings = self.language_model.embed(to_device(tokens, device))
        deepstack = None
        if images:
            places = to_device((tokens[0] == self.architecture.image_token_id).nonzero()[:, 0], device)
            features = torch.cat(self._encode(images))
            if len(places) != len(features):
                raise ValueError(
                    f"{len(places)} image tokens in the row, but {len(features)} image embeddings for them"
                )
            features = features.to(embeddings.dtype).unflatten(1, (-1, embeddings.shape[-1])).transpose(0, 1)
            if len(features) > 1:
                deepstack = [_at_places(layer, places, embeddings) for layer in features[1:]]
            embeddings = embeddings.index_copy(0, places, features[0].unsqueeze(1))
        if self.config.sequence_parallel:
            embeddings = scatter_to_sequence_parallel_region(embeddings)
            deepstack = deepstack and [scatter_to_sequence_parallel_region(layer) for layer in deepstack]
        return embeddings, torch.stack(deepstack) if deepstack else None

    def _encode(self, images: Sequence[VisionInputs]) -> list[Tensor]:
        """[tokens_i, width] embeddings of each image.

        A frozen tower's are kept for as long as their `VisionInputs` lives: the logprob passes and updates of a step
        share them. A trained tower encodes the distinct images of every row anew, for their gradient.
        """
        encoded = self._frozen_embeddings if self.freeze_vision else {}
        missing = [image for image in dict.fromkeys(images) if image not in encoded]
        if missing:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_vision):
                group = parallel_state.get_tensor_model_parallel_group()
                encoded.update(zip(missing, encode_images(self.vision, missing, group), strict=True))
        return [encoded[image] for image in images]

    def set_input_tensor(self, input_tensor) -> None:
        """What the schedule received from the previous stage: [S, 1, H], [S / TP, 1, H] under sequence parallelism."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """Asked for by Megatron, which sums the gradients of a tied embedding's two copies at PP > 1."""
        return self.language_model.shared_embedding_or_output_weight()


def build_vision_tower(architecture: Architecture, dtype: torch.dtype) -> VisionTower:
    """The family's tower, its weights of that dtype and not yet read."""
    tower = architecture.family.vision_tower(architecture.config)
    for parameter in tower.parameters():  # `tower.to(dtype)` would round the rotary frequencies, a buffer, as well
        parameter.data = parameter.data.to(dtype)
    return tower


def _at_places(features: Tensor, places: Tensor, embeddings: Tensor) -> Tensor:
    """[S, 1, H] like `embeddings`: the rows of [n, H] `features` at the n places, zero elsewhere."""
    return torch.zeros_like(embeddings).index_copy(0, places, features.unsqueeze(1))


@calls_megatron
def build_policy(
    architecture: Architecture, model: ModelConfig, parallel: ParallelConfig, platform: Platform
) -> VisionLanguagePolicy:
    """This rank's part of the policy, its weights allocated but not yet read.

    Needs `initialize_parallel`; raises UserError where the model cannot be cut into this layout.
    """
    architecture.check_layout(parallel)
    check_fp8(architecture, model, parallel)
    if platform.is_cuda:
        check_fp8_machine(model, platform.device)
    # Not for float32, which it multiplies as TF32, with ten bits of mantissa.
    transformer_engine = platform.is_cuda and model.dtype == "bfloat16" and transformer_engine_version() is not None
    with torch.device(platform.device):
        policy = VisionLanguagePolicy(
            architecture,
            architecture.transformer_config(model, parallel, platform, **fp8_options(model)),
            freeze_vision=model.freeze_vision,
            transformer_engine=transformer_engine,
            attention=model.attention,
        )
    if model.gradient_accumulation_fusion:
        fuse_gradient_accumulation(policy.language_model.decoder)
    return policy.to(platform.device)
