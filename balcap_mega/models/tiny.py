"""A small random checkpoint of a real architecture, in the Hugging Face layout, for the CPU quickstart and the tests.

Nothing downstream knows that it is small: it is imported, trained, exported and served like any other checkpoint.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

Family = Literal["qwen2_5_vl", "llava"]

QWEN_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
LLAVA_SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")

QWEN_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


DECODER = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


def write_tiny_checkpoint(
    folder: str | Path,
    family: Family,
    texts: Iterable[str],
    *,
    seed: int = 0,
    vocab_size: int = 1024,
    text_config: dict[str, Any] | None = None,
    vision_config: dict[str, Any] | None = None,
    tie_word_embeddings: bool = False,
) -> Path:
    """Write config, weights (float32 safetensors), tokenizer and processor of a randomly initialised policy.

    `texts` trains the byte-level BPE tokenizer (any text can be encoded); its vocabulary has at most `vocab_size`
    entries. `text_config` and `vision_config` override single keys of the sizes below.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write = {"qwen2_5_vl": _write_qwen2_5_vl, "llava": _write_llava}[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        write(folder, list(texts), vocab_size, text_config or {}, vision_config or {}, tie_word_embeddings)
    return folder


def _train_bpe(texts: list[str], vocab_size: int, special_tokens: tuple[str, ...]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _write_qwen2_5_vl(folder, texts, vocab_size, text_overrides, vision_overrides, tie_word_embeddings) -> None:
    bpe = _train_bpe(texts, vocab_size, QWEN_SPECIAL_TOKENS)
    bpe.model.save(str(folder))
    tokenizer = Qwen2Tokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        eos_token="<|im_end|>",
        additional_special_tokens=list(QWEN_SPECIAL_TOKENS[1:]),
    )
    token_id = tokenizer.convert_tokens_to_ids
    text = {
        **DECODER,
        "vocab_size": len(tokenizer),
        "rms_norm_eps": 1e-6,
        "initializer_range": _initial_std(text_overrides.get("hidden_size", DECODER["hidden_size"])),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": token_id("<|endoftext|>"),
        "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": token_id("<|endoftext|>"),
        "tie_word_embeddings": tie_word_embeddings,
    } | text_overrides
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "depth": 2,
        "num_heads": 4,
        "out_hidden_size": text["hidden_size"],
        "window_size": 112,
        "fullatt_block_indexes": [1],
        "initializer_range": _initial_std(vision_overrides.get("hidden_size", 64)),
    } | vision_overrides
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=tie_word_embeddings,
    )
    image_processor = Qwen2VLImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 1280})
    _save(
        folder,
        Qwen2_5_VLForConditionalGeneration(config),
        Qwen2_5_VLProcessor(image_processor, tokenizer, Qwen2VLVideoProcessor(), chat_template=QWEN_CHAT_TEMPLATE),
    )


def _write_llava(folder, texts, vocab_size, text_overrides, vision_overrides, tie_word_embeddings) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_train_bpe(texts, vocab_size, LLAVA_SPECIAL_TOKENS),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        model_input_names=["input_ids", "attention_mask"],
    )
    token_id = tokenizer.convert_tokens_to_ids
    text = {
        **DECODER,
        "vocab_size": len(tokenizer),
        "rms_norm_eps": 1e-5,
        "bos_token_id": token_id("<s>"),
        "eos_token_id": token_id("</s>"),
        "pad_token_id": token_id("<pad>"),
        "tie_word_embeddings": tie_word_embeddings,
    } | text_overrides
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 112,
        "patch_size": 14,
        "projection_dim": 64,
    } | vision_overrides
    side = vision["image_size"]
    config = LlavaConfig(
        text_config=LlamaConfig(**text),
        vision_config=CLIPVisionConfig(**vision),
        image_token_index=token_id("<image>"),
        image_seq_length=(side // vision["patch_size"]) ** 2,
        vision_feature_layer=-2,
        tie_word_embeddings=tie_word_embeddings,
    )
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_center_crop=True
    )
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=vision["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_CHAT_TEMPLATE,
    )
    _save(folder, LlavaForConditionalGeneration(config), processor)
    _rename_clip_tower(folder / "model.safetensors")


def _rename_clip_tower(path: Path) -> None:
    """The tower's names as published LLaVA-1.5 checkpoints have them: transformers reads both, vLLM only these."""
    weights = load_file(path)
    save_file(
        {re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", k): v for k, v in weights.items()},
        path,
        metadata={"format": "pt"},
    )


def _initial_std(width: int) -> float:
    """The usual 0.02 suits widths of thousands; at a width of a hundred, signals would fade and learning begin late."""
    return width**-0.5


def _save(folder: Path, model, processor) -> None:
    model.generation_config.eos_token_id = model.config.get_text_config().eos_token_id
    model.generation_config.pad_token_id = model.config.get_text_config().pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
