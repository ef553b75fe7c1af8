"""Prepare real images for training: check every image, extract every reference's units once, write one JSONL file.

    python launch/prepare_data.py --source sharegpt4v --data share-captioner.json --images /data \\
        --prefix coco/ --output prepared.jsonl --base-url http://judge:8000/v1 --model Qwen/Qwen2.5-VL-72B-Instruct

Train on the result with data.source=jsonl data.path=prepared.jsonl. Interrupted, it goes on where it stopped. An
output of another judge, or with other references, is refused.
"""

import argparse
import sys
from pathlib import Path

from balcap_mega.config.load import validate
from balcap_mega.config.schema import JudgeEndpoint, RewardConfig
from balcap_mega.data.files import ImageFileDataset
from balcap_mega.data.sources import READERS
from balcap_mega.errors import UserError
from balcap_mega.evaluation.fingerprint import claim, digest, of_judge, packaged_prompts
from balcap_mega.evaluation.report import progress_bar
from balcap_mega.rewards.mllm.judge import MllmJudge
from balcap_mega.rewards.mllm.prepare import prepare


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    return parser.parse_args()


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
    parts = {"judge prompt": digest(prompts["units.txt"]), **of_judge(endpoint, "--base-url", "--model")}
    claim(Path(options.output), parts, judge_moved=options.judge_moved)
    judge = MllmJudge(RewardConfig(judge="mllm", endpoint=endpoint))
    try:
        judge.check(["units"])
        with progress_bar("reference units", len(dataset)) as advance:
            report = prepare(dataset, options.output, judge, advance)
        spent = judge.report()
    finally:
        judge.close()
    print(
        f"{options.output}: {report.written} rows written, {report.already_there} were there; left out: "
        f"{dataset.missing} without image, {report.corrupt_images} corrupt, {report.failed_units} without units; "
        f"{spent.requests} requests, {spent.prompt_tokens} prompt and {spent.completion_tokens} completion tokens"
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        sys.exit(2)
