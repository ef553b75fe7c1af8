"""Prepare real images for training: check every image, ask a model about each row once, write one JSONL file.

    python launch/prepare_data.py units --source sharegpt4v --data share-captioner.json --images /data \\
        --prefix coco/ --output prepared.jsonl --base-url http://judge:8000/v1 --model Qwen/Qwen2.5-VL-72B-Instruct
    python launch/prepare_data.py questions --source jsonl --data prepared.jsonl --images /data \\
        --output asked.jsonl --base-url http://judge:8000/v1 --model Qwen/Qwen2.5-VL-72B-Instruct

units      the facts that each reference states, for recall
questions  questions with options about each picture, for utility: those that the model answers right with the picture
           and not reliably without it, as CapRL keeps them

Train on the result with data.source=jsonl data.path=asked.jsonl. Interrupted, it goes on where it stopped. An output of
another model, or with other references, is refused.
"""

import argparse
import sys
from concurrent.futures import Future
from pathlib import Path

from balcap_mega.config.load import validate
from balcap_mega.config.schema import JudgeEndpoint, RewardConfig
from balcap_mega.data.files import ImageFileDataset
from balcap_mega.data.sources import READERS
from balcap_mega.errors import UserError
from balcap_mega.evaluation.fingerprint import claim, digest, of_judge, packaged_prompts
from balcap_mega.evaluation.report import progress_bar
from balcap_mega.rewards.mllm.asking import PROMPTS, QuestionMaker
from balcap_mega.rewards.mllm.judge import MllmJudge
from balcap_mega.rewards.mllm.prepare import prepare

MOST_QUESTIONS = 32  # about a picture


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("units", "questions"), default="units")
    parser.add_argument("--source", choices=READERS, required=True)
    parser.add_argument("--data", required=True, help="the annotation file")
    parser.add_argument("--images", required=True, help="the folder that image paths are relative to")
    parser.add_argument("--output", required=True, help="the JSONL file to write or to complete")
    parser.add_argument("--prefix", action="append", default=[], help="keep images whose path starts so; repeatable")
    parser.add_argument("--max-missing-fraction", type=float, default=0.01)
    parser.add_argument("--base-url", required=True, help="an OpenAI-compatible endpoint, http://host:port/v1")
    parser.add_argument("--model", required=True)
    parser.add_argument("--api-key-env", help="the environment variable that holds the endpoint's key")
    parser.add_argument("--judge-moved", action="store_true", help="the same endpoint as before has a new address")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--count", type=int, default=5, help="questions to ask for about each picture")
    options = parser.parse_args()
    if not 1 <= options.count <= MOST_QUESTIONS:
        raise UserError(f"--count {options.count} is out of range", remedy=f"give 1 to {MOST_QUESTIONS}")
    return options


def main() -> None:
    options = parse_arguments()
    dataset = ImageFileDataset(
        READERS[options.source](options.data, options.prefix),
        options.images,
        max_missing_fraction=options.max_missing_fraction,
    )
    endpoint = {
        "base_url": options.base_url,
        "model": options.model,
        "api_key_env": options.api_key_env,
        "concurrency": options.concurrency,
    }
    endpoint = validate(JudgeEndpoint, endpoint, "the endpoint's options")
    prompts = packaged_prompts("balcap_mega.rewards.mllm")
    if options.what == "units":
        parts = {"judge prompt": digest(prompts["units.txt"])}
        asker = MllmJudge(RewardConfig(judge="mllm", endpoint=endpoint))
    else:
        parts = {"prompts": digest([prompts[f"{name}.txt"] for name in PROMPTS]), "--count": options.count}
        asker = QuestionMaker(endpoint, options.count)

    def ask(index: int) -> Future[tuple]:
        if isinstance(asker, MllmJudge):
            return asker.submit_units(dataset.rows[index].reference)
        return asker.submit(dataset.rows[index].id, dataset[index].image)

    try:
        parts |= of_judge(endpoint, "--base-url", "--model")
        claim(Path(options.output), parts, judge_moved=options.judge_moved)
        if isinstance(asker, MllmJudge):
            asker.check(["units"])
        else:
            asker.check()
        with progress_bar(options.what, len(dataset)) as advance:
            report = prepare(dataset, options.output, options.what, ask, advance)
        spent = asker.report()
    finally:
        asker.close()
    none = f" ({report.none_kept} of them without any that is kept)" if report.none_kept else ""
    print(
        f"{options.output}: {report.written} rows written{none}, {report.already_there} were there; left out: "
        f"{dataset.missing} without image, {report.corrupt_images} corrupt, {report.failed} without {options.what}; "
        f"{spent.requests} requests, {spent.prompt_tokens} prompt and {spent.completion_tokens} completion tokens"
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        sys.exit(2)
