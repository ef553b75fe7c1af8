"""GRPO steps of TRL: `python trl_step.py CHECKPOINT IMAGES GROUP CAPTION_TOKENS REPEATS`; the last line is JSON.

The same model, images, group size and caption length as `train_step.py` uses; the vision tower is frozen there too, no
KL, one update a step, a reward that costs nothing. The first step warms up, the fastest of the others counts.
"""

import json
import sys
import tempfile
import time

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import GRPOConfig, GRPOTrainer

BATCH = 8  # sequences a forward pass, TRL's default


class TimedTrainer(GRPOTrainer):
    """Times each optimizer step and the generation in it. A step's `training_step`s are its microbatches."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.generation_seconds: list[float] = []
        self.microbatch_seconds: list[float] = []

    def _generate(self, prompts):
        start = time.perf_counter()
        generated = super()._generate(prompts)
        self.generation_seconds.append(time.perf_counter() - start)
        return generated

    def training_step(self, *args, **kwargs):
        start = time.perf_counter()
        loss = super().training_step(*args, **kwargs)
        self.microbatch_seconds.append(time.perf_counter() - start)
        return loss

    def steps(self) -> list[tuple[float, float]]:
        """(whole step, generation in it), in seconds."""
        count = len(self.generation_seconds)
        each = len(self.microbatch_seconds) // count
        totals = (sum(self.microbatch_seconds[step * each :][:each]) for step in range(count))
        return list(zip(totals, self.generation_seconds, strict=True))


def main(checkpoint: str, images: int, group: int, caption_tokens: int, repeats: int) -> dict[str, float]:
    batch = min(BATCH, images * group)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_tower" not in name and "multi_modal_projector" not in name)
    noise = np.random.default_rng(0)
    pictures = [Image.fromarray(noise.integers(0, 255, (336, 336, 3), dtype=np.uint8)) for _ in range(images)]
    prompt = [{"role": "user", "content": "Describe the image."}]
    with tempfile.TemporaryDirectory() as output:
        trainer = TimedTrainer(
            model,
            reward_funcs=lambda completions, **_: [float(len(str(completion))) for completion in completions],
            args=GRPOConfig(
                output_dir=output,
                use_cpu=not torch.cuda.is_available(),
                bf16=False,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=images * group // batch,
                num_generations=group,
                max_completion_length=caption_tokens,
                generation_kwargs={"min_new_tokens": caption_tokens},
                max_steps=1 + repeats,
                learning_rate=1e-6,
                beta=0.0,
                gradient_checkpointing=False,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([{"prompt": prompt, "image": picture} for picture in pictures]),
            processing_class=AutoProcessor.from_pretrained(checkpoint),
        )
        trainer.train()
    first, *others = trainer.steps()
    step, generation = min(others)
    return {
        "first_step_seconds": round(first[0], 3),
        "generation_seconds": round(generation, 3),
        "update_seconds": round(step - generation, 3),
        "step_seconds": round(step, 3),
        "samples_per_second": round(images * group / step, 2),
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], *map(int, sys.argv[2:]))))
