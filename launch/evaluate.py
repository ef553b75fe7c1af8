"""Score captions with the field's benchmarks, or with BalCapRL's own score.

    J="--judge-url http://host:port/v1 --judge-model NAME"
    python launch/evaluate.py bcapscore $J --captions captions.json --references references.jsonl --images photos/ \\
        --output judged.jsonl
    python launch/evaluate.py dcscore $J --captions captions.jsonl --annotations facts.jsonl --images images/ \\
        --output results/
    python launch/evaluate.py captionqa $J --captions captions.json --questions questions.parquet --output answers.json
    python launch/evaluate.py caparena $J --captions captions.json --battles caparena_auto_600.json \\
        --images all_images/ --name My-Model --output My-Model.json

With --model DIR the images are captioned first, by vLLM, into the file that --captions names. An interrupted run
goes on where it stopped.
"""

import argparse
import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

from balcap_mega.config.load import validate
from balcap_mega.config.schema import JudgeEndpoint, RewardConfig
from balcap_mega.data.files import ImageFileDataset
from balcap_mega.data.jsonl import DEFAULT_PROMPT, read_jsonl
from balcap_mega.errors import UserError
from balcap_mega.evaluation import bcapscore, caparena, captionqa, dcscore
from balcap_mega.evaluation.report import progress_bar, write_report
from balcap_mega.evaluation.session import (
    Spending,
    add_to_ledger,
    check,
    read_json,
    write_json,
    write_json_lines,
)
from balcap_mega.rewards.mllm.client import ChatClient
from balcap_mega.rewards.mllm.judge import MllmJudge


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--captions", type=Path, required=True)
    common.add_argument("--output", type=Path, required=True, help="results, in the benchmark's own format")
    common.add_argument("--judge-url", required=True, help="an OpenAI-compatible endpoint, http://host:port/v1")
    common.add_argument("--judge-model", required=True)
    common.add_argument("--api-key-env", help="the environment variable that holds the endpoint's key")
    common.add_argument("--concurrency", type=int, default=32)
    common.add_argument("--timeout", type=int, default=120, help="seconds a request may take")
    common.add_argument("--max-retries", type=int, default=5)
    common.add_argument("--price-prompt", type=float, help="US dollars a million prompt tokens")
    common.add_argument("--price-completion", type=float, help="US dollars a million completion tokens")
    common.add_argument("--model", type=Path, help="a checkpoint to caption the images with first")
    common.add_argument("--caption-prompt", default=DEFAULT_PROMPT)
    common.add_argument("--caption-tokens", type=int, default=512)
    common.add_argument("--max-model-len", type=int, default=4096)
    others = argparse.ArgumentParser(add_help=False)
    others.add_argument("--mend", action="store_true", help="mend the original's quirks (see the benchmark's module)")
    others.add_argument("--prompts", type=Path, help="a folder of judge prompts to use in place of ours")

    score = benchmarks.add_parser("bcapscore", parents=[common])
    score.add_argument("--references", type=Path, required=True, help="JSON Lines of image, reference and maybe units")
    score.add_argument("--images", type=Path, required=True)
    score = benchmarks.add_parser("dcscore", parents=[common, others])
    score.add_argument("--annotations", type=Path, required=True, help="human_annotated_oracle_facts.jsonl")
    score.add_argument("--images", type=Path, required=True)
    score = benchmarks.add_parser("captionqa", parents=[common, others])
    score.add_argument("--questions", type=Path, required=True, help="the data set as JSON, JSON Lines or Parquet")
    score.add_argument("--images", type=Path, help="images named by their id; needed with --model")
    score.add_argument("--seed", type=int, default=0)
    score.add_argument("--max-tokens", type=int, default=4)
    score = benchmarks.add_parser("caparena", parents=[common, others])
    score.add_argument("--battles", type=Path, required=True, help="caparena_auto_600.json")
    score.add_argument("--images", type=Path, required=True)
    score.add_argument("--name", required=True, help="the model's name in the results")
    score.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


class Evaluation:
    """The parts of a command that the benchmarks share."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        endpoint = {
            "base_url": options.judge_url,
            "model": options.judge_model,
            "api_key_env": options.api_key_env,
            "concurrency": options.concurrency,
            "timeout_seconds": options.timeout,
            "max_retries": options.max_retries,
        }
        self.endpoint = validate(JudgeEndpoint, endpoint, "the judge's options")

    def caption(
        self, images: dict[str, Path], captions: dict[str, str], save: Callable[[dict[str, str]], None]
    ) -> None:
        """With --model, add captions of those `images` that have none yet, saving after every batch."""
        wanted = {key: path for key, path in images.items() if key not in captions}
        if self.options.model is None or not wanted:
            return
        from balcap_mega.evaluation.captioning import caption_images

        options = self.options
        with progress_bar("captions", len(wanted)) as advance:
            for batch in caption_images(
                options.model, wanted, options.caption_prompt, options.caption_tokens, options.max_model_len
            ):
                captions |= batch
                save(captions)
                for _ in batch:
                    advance()

    def ask(self, run: Callable, total: int) -> Spending:
        """Run `run(client, progress)` against the endpoint."""

        async def session() -> Spending:
            client = ChatClient(self.endpoint)
            try:
                await check(client)
                with progress_bar(self.options.benchmark, total) as advance:
                    await run(client, advance)
            finally:
                await client.close()
            return self.spending(client.counters)

        return asyncio.run(session())

    def spending(self, counters) -> Spending:
        return Spending.of(counters, self.options.price_prompt, self.options.price_completion)

    def report(self, figures: dict[str, float], breakdown: list[dict], spent: Spending) -> None:
        output = self.options.output
        total = add_to_ledger(output.with_name(output.name + ".spent.json"), spent)
        settings = {name: str(value) for name, value in vars(self.options).items() if value is not None}
        path = output.with_name(output.name + ".report.json")
        write_report(path, self.options.benchmark, figures, breakdown, spent, total, settings)


def run_bcapscore(evaluation: Evaluation) -> None:
    options = evaluation.options
    dataset = ImageFileDataset(read_jsonl(options.references), options.images, max_missing_fraction=0)
    captions = read_captions(options)
    evaluation.caption(
        {row.image: options.images / row.image for row in dataset.rows},
        captions,
        lambda captions: write_json(options.captions, captions),
    )
    run = bcapscore.BCapScoreRun(dataset, captions, options.output)
    judge = MllmJudge(RewardConfig(judge="mllm", endpoint=evaluation.endpoint))
    try:
        judge.check()
        with progress_bar("bcapscore", len(dataset)) as advance:
            run.run(judge, advance)
        spent = evaluation.spending(judge.report())
    finally:
        judge.close()
    evaluation.report(run.summarize(), [], spent)


def run_dcscore(evaluation: Evaluation) -> None:
    options = evaluation.options
    annotations = dcscore.read_annotations(options.annotations)
    rows = []
    if options.captions.exists() or options.model is None:
        rows = dcscore.read_captions(options.captions)

    def save(captions: dict[str, str]) -> None:
        rows[:] = [
            {"image_path": name, "caption": caption, "oracle_caption": annotations[name].get("oracle_caption")}
            for name, caption in captions.items()
        ]
        write_json_lines(options.captions, rows)

    evaluation.caption(
        {name: options.images / name for name in annotations},
        {row["image_path"]: row["caption"] for row in rows},
        save,
    )
    run = dcscore.DcScoreRun(rows, annotations, options.images, options.output, options.mend, options.prompts)
    run.check()
    spent = evaluation.ask(run.run, len(rows))
    evaluation.report(dcscore.summarize(options.output, options.mend), [], spent)


def run_captionqa(evaluation: Evaluation) -> None:
    options = evaluation.options
    rows = captionqa.read_questions(options.questions)
    captions = read_captions(options)
    if options.model is not None:
        if options.images is None:
            raise UserError("--model needs --images", remedy="name the folder of images, each named by its id")
        ids = {str(row.get("id")) for row in rows}
        images = {path.stem: path for path in sorted(options.images.iterdir()) if path.stem in ids}
        evaluation.caption(images, captions, lambda captions: write_json(options.captions, captions))
    questions = captionqa.plan(rows, captions, options.seed, options.mend)
    run = captionqa.CaptionQaRun(questions, captions, options.output, options.mend, options.prompts, options.max_tokens)
    spent = evaluation.ask(run.run, len(questions))
    evaluation.report(*captionqa.summarize(options.output, questions), spent)


def run_caparena(evaluation: Evaluation) -> None:
    options = evaluation.options
    table = caparena.read_battles(options.battles)
    captions = read_captions(options)
    evaluation.caption(
        {name: options.images / name for name in table},
        captions,
        lambda captions: write_json(options.captions, captions),
    )
    battles = caparena.draw_battles(table, captions, options.name, options.seed)
    run = caparena.CapArenaRun(battles, options.images, options.output, options.prompts)
    run.check()
    spent = evaluation.ask(run.run, len(battles))
    figures = caparena.summarize(
        read_json(options.output, "battles", list[caparena.Battle]), options.name, options.mend
    )
    evaluation.report(figures, [], spent)


def read_captions(options: argparse.Namespace) -> dict[str, str]:
    if options.model is not None and not options.captions.exists():
        return {}
    return read_json(options.captions, 'captions, {"image": "caption", …}', dict[str, str])


BENCHMARKS = {
    "bcapscore": run_bcapscore,
    "dcscore": run_dcscore,
    "captionqa": run_captionqa,
    "caparena": run_caparena,
}

if __name__ == "__main__":
    try:
        options = parse_arguments()
        BENCHMARKS[options.benchmark](Evaluation(options))
    except UserError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        sys.exit(2)
