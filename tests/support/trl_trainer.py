"""TRL's own GRPOTrainer on a tiny random model, on the CPU: what our algorithm is compared with."""

from collections.abc import Callable
from pathlib import Path

VOCABULARY = 24


def tiny_trl_trainer(folder: Path, reward_functions: list[Callable], *, prompts: int = 1, **options):
    """A GRPOTrainer with `options` of GRPOConfig; imported here, since TRL takes seconds to import."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    words = {"<pad>": 0, "<eos>": 1, "a": 2, "b": 3} | {f"w{i}": i for i in range(4, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, pad_token_id=0, eos_token_id=1, tie_word_embeddings=False, initializer_range=0.5,
        )
    )  # fmt: skip
    return GRPOTrainer(
        model=model,
        reward_funcs=reward_functions,
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"),
        train_dataset=Dataset.from_dict({"prompt": ["a b"] * prompts}),
        args=GRPOConfig(output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, **options),
    )
