"""What the small checkpoints of all families are made of; see `Family.write_tiny`."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

DECODER = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


def train_bpe(texts: list[str], vocab_size: int, special_tokens: tuple[str, ...]) -> Tokenizer:
    """A byte-level tokenizer of at most `vocab_size` entries, which encodes any text."""
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


def initial_std(width: int) -> float:
    """The usual 0.02 suits widths of thousands; at a width of a hundred, signals would fade and learning begin late."""
    return width**-0.5


def save(folder: Path, model, processor) -> None:
    """Write both as transformers does, with the generation ending where the tokenizer's texts do."""
    model.generation_config.eos_token_id = model.config.get_text_config().eos_token_id
    model.generation_config.pad_token_id = model.config.get_text_config().pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
