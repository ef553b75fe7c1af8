"""Score captions with DCScore, CaptionQA, CapArena-Auto or b-CapScore; --help says how.

The command line stands in `balcap_mega.evaluation.options`, each benchmark in a module of its name beside it.
"""

import argparse
import asyncio
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from balcap_mega.cli import quiet_libraries
from balcap_mega.config.load import validate
from balcap_mega.config.preflight import check_model
from balcap_mega.config.schema import JudgeEndpoint, ModelConfig, ParallelConfig, RewardConfig, RolloutConfig
from balcap_mega.errors import UserError
from balcap_mega.evaluation import bcapscore, caparena, captionqa, captionqa_questions, dcscore
from balcap_mega.evaluation.fingerprint import beside, claim, digest, of_judge, packaged_prompts
from balcap_mega.evaluation.options import dialect_of, in_options, parse_arguments
from balcap_mega.evaluation.pictures import MISSING, UNREADABLE, Pictures
from balcap_mega.evaluation.provenance import CaptionsMaker, checkpoint_digest, continued, origin
from balcap_mega.evaluation.report import progress_bar, write_report
from balcap_mega.evaluation.session import (
    Coverage,
    Spending,
    add_to_ledger,
    check,
    load_prompts,
    read_json,
    write_json,
    write_json_lines,
)
from balcap_mega.rewards.mllm.client import ChatClient
from balcap_mega.rewards.mllm.judge import MllmJudge

BAD_INPUT, TOO_MUCH_UNJUDGED = 2, 3  # exit statuses
ASK_AGAIN = "run the same command again to ask for the rest once more"
REMEDIES = {
    MISSING: "complete the pictures, and run the same command again",
    UNREADABLE: "replace the pictures that cannot be decoded, and run the same command again",
    "no_facts": "score captions without facts as 0, by --mend and another --output",
    "other_wording": "count judgments in other words too, by --mend",
}


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
            "dialect": dialect_of(options.dialect),
        }
        self.endpoint = validate(JudgeEndpoint, endpoint, "the judge's options")
        self.maker = None if options.model is None else self._maker()

    def _maker(self) -> CaptionsMaker:
        from balcap_mega.models.families import FAMILIES  # slow to import, and only captioning needs it

        options = self.options
        rollout = {"max_tokens": options.caption_tokens, "max_model_len": options.max_model_len}
        model = ModelConfig(path=str(options.model))
        check_model(model, ParallelConfig(), validate(RolloutConfig, rollout, "the captioning options"), FAMILIES)
        content = checkpoint_digest(options.model)
        return CaptionsMaker(str(options.model), content, options.caption_prompt, options.caption_tokens)

    def look_at(self, names: Iterable[str]) -> Pictures:
        """The pictures of --images. Raises UserError if too many of them cannot be used."""
        pictures = Pictures.look_at(self.options.images, names)
        pictures.refuse_too_many_unusable(self.options.max_unjudged)
        return pictures

    def read_captions(self) -> dict[str, str]:
        if self.maker is not None and not self.options.captions.exists():
            return {}
        return read_json(self.options.captions, 'captions, {"image": "caption", …}', dict[str, str])

    def complete(
        self,
        captions: dict[str, str],
        names: Mapping[str, str],
        pictures: Pictures,
        save: Callable[[dict[str, str]], None] | None = None,
    ) -> None:
        """With --model, caption those of the pictures `names`, by a key of the caption's, that have none yet.

        Raises UserError for captions that another checkpoint wrote.
        """
        options, path = self.options, self.options.captions
        if self.maker is None:
            return
        digests = {key: pictures.digests[name] for key, name in names.items() if name in pictures.digests}
        provenance = continued(path, captions, self.maker, digests)
        wanted = {key: names[key] for key in digests if key not in captions}
        if not wanted:
            return
        from balcap_mega.evaluation.captioning import caption_images

        with progress_bar("captions", len(wanted)) as advance:
            for batch in caption_images(
                options.model, pictures, wanted, options.caption_prompt, options.caption_tokens, options.max_model_len
            ):
                captions |= batch
                provenance.add(batch, digests)
                provenance.write(path)
                (save or (lambda captions: write_json(path, captions)))(captions)
                for _ in batch:
                    advance()

    def claim(self, protocol: int, parts: dict[str, Any], pictures: Pictures | None = None) -> None:
        """Make --output this evaluation's, or refuse it: `parts` is all that determines results, but the judge."""
        everything = {"benchmark": self.options.benchmark, "protocol": protocol, **parts, **of_judge(self.endpoint)}
        digests = None if pictures is None else pictures.digests
        claim(self.options.output, everything, digests, judge_moved=self.options.judge_moved)

    def ask(self, run: Callable, total: int, picture: bool = False, tokens: int = 2000) -> tuple[Counter, Spending]:
        """Run `run(client, progress)`; return what got no judgement, by reason, and what was spent."""

        async def session() -> tuple[Counter, Spending]:
            client = ChatClient(self.endpoint)
            try:
                await check(client, picture, tokens)
                with progress_bar(self.options.benchmark, total) as advance:
                    missing = await run(client, advance)
            finally:
                await client.close()
            return missing, self.spending(client.counters)

        return asyncio.run(session())

    def spending(self, counters) -> Spending:
        return Spending.of(counters, self.options.price_prompt, self.options.price_completion)

    def finish(
        self,
        coverage: Coverage,
        summarize: Callable[[], tuple[dict[str, float], list[dict]]],
        spent: Spending,
        captions_by: dict | None,
    ) -> int:
        """Report the figures beside how much was judged; return the exit status."""
        output, most = self.options.output, self.options.max_unjudged
        total = add_to_ledger(beside(output, "spent.json"), spent)
        if not coverage.judged:
            beside(output, "report.json").unlink(missing_ok=True)
            print(f"evaluate: there is no score: {coverage}", file=sys.stderr)
            return TOO_MUCH_UNJUDGED
        figures, breakdown = summarize()
        settings = {name: str(value) for name, value in vars(self.options).items() if value is not None}
        origins = {"captions_by": captions_by, "settings": settings}
        path = beside(output, "report.json")
        write_report(path, self.options.benchmark, figures, breakdown, coverage, spent, total, origins)
        if coverage.total - coverage.judged > most * coverage.total:
            remedy = "; ".join(dict.fromkeys(REMEDIES.get(why, ASK_AGAIN) for why in sorted(coverage.missing)))
            print(
                f"evaluate: the score is over a part only, {coverage}; --max-unjudged is {most:g} — {remedy}",
                file=sys.stderr,
            )
            return TOO_MUCH_UNJUDGED
        return 0


def run_bcapscore(evaluation: Evaluation) -> int:
    options = evaluation.options
    rows = bcapscore.read_references(options.references)
    pictures = evaluation.look_at(row.image for row in rows)
    captions = evaluation.read_captions()
    evaluation.complete(captions, {row.image: row.image for row in rows}, pictures)
    run = bcapscore.BCapScoreRun(rows, captions, pictures, options.output)
    run.check()
    used = {row.image: captions.get(row.image) for row in rows}
    parts = {"--captions": digest(used), "--references": digest([asdict(row) for row in rows])}
    prompts = packaged_prompts("balcap_mega.rewards.mllm")
    evaluation.claim(bcapscore.PROTOCOL, {**parts, "judge prompts": digest(prompts)}, pictures)
    # A caption of which one part failed is judged again as a whole; what was answered of it is not paid for again.
    replies = str(beside(options.output, "replies"))
    judge = MllmJudge(RewardConfig(judge="mllm", endpoint=evaluation.endpoint, cache_dir=replies))
    try:
        judge.check()
        with progress_bar("bcapscore", len(rows)) as advance:
            missing = run.run(judge, advance)
        spent = evaluation.spending(judge.report())
    finally:
        judge.close()
    by = origin(options.captions, captions, pictures)
    return evaluation.finish(Coverage(len(rows), missing), lambda: (run.summarize(), []), spent, by)


def run_dcscore(evaluation: Evaluation) -> int:
    options = evaluation.options
    annotations = dcscore.read_annotations(options.annotations)
    rows: list[dcscore.Captioned] = []
    references = {}
    if options.model is not None:
        references = dcscore.oracle_captions(annotations)
    if options.captions.exists() or options.model is None:
        rows = dcscore.read_captions(options.captions)
        dcscore.check_captions(rows, annotations)

    def save(captions: dict[str, str]) -> None:
        rows[:] = [
            {"image_path": name, "caption": caption, "oracle_caption": references[name]}
            for name, caption in captions.items()
        ]
        write_json_lines(options.captions, rows)

    names = annotations if options.model is not None else [row["image_path"] for row in rows]
    pictures = evaluation.look_at(names)
    captions = {row["image_path"]: row["caption"] for row in rows}
    evaluation.complete(captions, {name: name for name in annotations}, pictures, save)
    dcscore.check_captions(rows, annotations)
    prompts = load_prompts(dcscore.PROMPTS, options.prompts)
    facts = {name: row["oracle_facts"] for name, row in annotations.items()}
    parts = {"--captions": digest(rows), "--annotations": digest(facts), "--mend": options.mend}
    evaluation.claim(dcscore.PROTOCOL, {**parts, "--prompts": digest(prompts)}, pictures)
    run = dcscore.DcScoreRun(rows, annotations, pictures, options.output, options.mend, prompts)
    missing, spent = evaluation.ask(run.run, len(rows), picture=True)
    uncaptioned = [name for name in pictures.unusable if name not in captions]
    missing += Counter(pictures.unusable[name] for name in uncaptioned)
    return evaluation.finish(
        Coverage(len(rows) + len(uncaptioned), missing),
        lambda: (dcscore.summarize(options.output, options.mend, len(rows)), []),
        spent,
        origin(options.captions, captions, pictures),
    )


def run_captionqa(evaluation: Evaluation) -> int:
    options = evaluation.options
    rows = captionqa_questions.read_questions(options.questions)
    captions = evaluation.read_captions()
    pictures = None
    if options.model is not None:
        names = captionqa_questions.pictures_by_id(rows, options.images)
        pictures = evaluation.look_at(names.values())
        evaluation.complete(captions, names, pictures)
    questions = captionqa_questions.plan(rows, captions, options.seed, options.mend)
    if not questions:
        raise UserError(
            f"--captions {options.captions}: no question of {options.questions} is about any of its images",
            remedy="name each caption by the data set's id, such as nat_001",
        )
    prompts = load_prompts(captionqa.PROMPTS, options.prompts)
    asked = {question.image for question in questions}
    parts = {
        "--captions": digest({image: captions.get(image) for image in asked}),
        "--questions": digest([asdict(question) for question in questions]),
        "--mend": options.mend,
        "--seed": options.seed,
        "--max-tokens": options.max_tokens,
        "--prompts": digest(prompts),
    }
    evaluation.claim(captionqa.PROTOCOL, parts)
    run = captionqa.CaptionQaRun(questions, captions, options.output, options.mend, prompts, options.max_tokens)
    missing, spent = evaluation.ask(run.run, len(questions), tokens=options.max_tokens)
    left_out = {str(row.get("id")) for row in rows} - captions.keys()
    return evaluation.finish(
        Coverage(len(questions), missing),
        lambda: captionqa.summarize(options.output, questions, without_caption=len(left_out)),
        spent,
        origin(options.captions, captions, pictures),
    )


def run_caparena(evaluation: Evaluation) -> int:
    options = evaluation.options
    table = caparena.read_battles(options.battles)
    captions = evaluation.read_captions()
    pictures = evaluation.look_at(table)
    evaluation.complete(captions, {name: name for name in table}, pictures)
    battles = caparena.draw_battles(table, captions, options.name, options.seed, excused=pictures.unusable)
    prompts = load_prompts(caparena.PROMPTS, options.prompts)
    # Replies are kept word for word and read anew each time, so --mend decides nothing that is kept.
    parts = {"--captions, --battles, --name or --seed": digest(battles), "--prompts": digest(prompts)}
    evaluation.claim(caparena.PROTOCOL, parts, pictures)
    run = caparena.CapArenaRun(battles, pictures, options.output, prompts)
    missing, spent = evaluation.ask(run.run, len(battles), picture=True)
    judged = read_json(options.output, "battles", list[caparena.Battle])
    missing += Counter(other_wording=caparena.uncounted(judged, options.mend))
    uncaptioned = [name for name in pictures.unusable if name not in captions]
    missing += Counter(pictures.unusable[name] for name in uncaptioned)
    return evaluation.finish(
        Coverage(len(battles) + len(uncaptioned), missing),
        lambda: (caparena.summarize(judged, options.name, options.mend), []),
        spent,
        origin(options.captions, captions, pictures),
    )


BENCHMARKS = {
    "bcapscore": run_bcapscore,
    "dcscore": run_dcscore,
    "captionqa": run_captionqa,
    "caparena": run_caparena,
}

if __name__ == "__main__":
    options = parse_arguments()
    quiet_libraries()
    try:
        sys.exit(BENCHMARKS[options.benchmark](Evaluation(options)))
    except UserError as error:
        print(f"evaluate: {in_options(str(error))}", file=sys.stderr)
        sys.exit(BAD_INPUT)
