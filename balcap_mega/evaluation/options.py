"""The command line of launch/evaluate.py: what each benchmark is, the files it reads, who judged what is published."""

import argparse
from pathlib import Path
from typing import Any

import yaml

from balcap_mega.data.jsonl import DEFAULT_PROMPT
from balcap_mega.errors import UserError

ABOUT = """\
Score captions with the field's benchmarks, or with BalCapRL's own score.

    J="--judge-url http://host:port/v1 --judge-model NAME"
    python launch/evaluate.py bcapscore $J --captions captions.json --references references.jsonl --images photos/ \\
        --output judged.jsonl
    python launch/evaluate.py dcscore $J --captions captions.jsonl --annotations facts.jsonl --images images/ \\
        --output results/
    python launch/evaluate.py captionqa $J --captions captions.json --questions questions.parquet --output answers.json
    python launch/evaluate.py caparena $J --captions captions.json --battles caparena_auto_600.json \\
        --images all_images/ --name My-Model --output My-Model.json

With --model DIR that checkpoint captions the images first, into the file that --captions names. The same command goes
on where an interrupted one stopped, and asks again for what got no usable reply. Results that were made from anything
else (captions, references, judge, prompts, options) are refused, never mixed.

`evaluate.py BENCHMARK --help` says what a benchmark measures, shows its files, and names its data and its judge.

exit status: 0 done; 2 bad input, or a judge that does not answer; 3 more than --max-unjudged of it has no judgement
"""

BCAPSCORE = """\
b-CapScore of BalCapRL (arXiv 2605.07394), on any images with reference captions. For each caption the judge finds
precision (assertions that are true and point at something visible, over all), recall (facts of the reference that are
covered, over all) and linguistic quality (mean of clarity, fluency and coherency).

b_capscore       harmonic mean of the three corpus means; each mean is over the captions that have that component
mean_b_capscore  mean of each caption's own harmonic mean, over the captions that have all three; another number
An image with several references is judged, and counts, once for each.

--captions       one JSON object:      {"cat.jpg": "A grey cat sits on a red sofa.", ...}
--references     JSON Lines:           {"image": "cat.jpg", "reference": "A cat on a sofa.", "units": ["A cat."]}
                 "units", the facts of recall, are asked of the judge where they are absent (launch/prepare_data.py
                 writes them once for all)
--output         JSON Lines, one line a row and judgement

judge:           what judged the paper's numbers is not known to us. Any multimodal one behind an OpenAI-compatible
                 endpoint that keeps to a JSON schema; scores of two judges do not compare
data:            your own images and references
"""

DCSCORE = """\
DCScore of DeCapBench (arXiv 2503.07906): the caption is broken into atomic facts, each verified in the image and
matched to facts that people wrote. 400 images, 7 replies each: facts once, matching and verification thrice.

--captions       JSON Lines:           {"image_path": "a.jpg", "caption": "A grey cat", "oracle_caption": "A cat"}
--annotations    JSON Lines:           {"image_name": "a.jpg", "oracle_facts": ["There is a cat.", ...], ...}
--output         a folder of <row>.json, which the original's compute_results.py reads
--prompts        a folder with dcscore_extract.txt ({caption}), dcscore_match.txt ({predicted_atomic_facts},
                 {oracle_atomic_facts}), dcscore_verify.txt ({reference_caption}, {atomic_facts}); the original's
                 extract_prompt, match_prompt and verify_prompt of evaluation_decapbench.py as they stand there

judge:           gpt-4o-2024-05-13 judged the published numbers, with the original's prompts; ours are worded anew
data:            github.com/MAGAer13/DeCapBench: human_annotated_oracle_facts.jsonl and its images (ImageInWords' 400)
"""

CAPTIONQA = """\
CaptionQA (arXiv 2511.21025): multiple-choice questions about an image, answered by a text-only judge that sees nothing
but the caption. Right 1, wrong 0, "cannot answer" 1 / options + 0.05. Four domains.

--captions       one JSON object:      {"nat_001": "A grey cat sits on fallen leaves ...", ...}
--questions      JSON, JSON Lines or Parquet (which needs pyarrow), rows of the data set:
                 {"id": "nat_001", "domain": "natural", "questions": [{"question": "What colour is the cat?",
                  "choices": ["Grey", "Black"], "answer": "Grey", "category": ["Attributes"]}]}
--images         for --model: a folder of pictures named by their id, nat_001.jpg
--output         one JSON object {"nat_001": [answer, ...]}, as the original's qa.py writes it
--prompts        a folder with captionqa.txt, the system prompt; the original's system_prompt of qa.py as it stands
--max-tokens     4, as published; for a judge that thinks first, add --dialect thinking_tokens=4096

judge:           Qwen/Qwen2.5-72B-Instruct judged the published numbers
data:            huggingface.co/datasets/Borise/CaptionQA
"""

CAPARENA = """\
CapArena-Auto (arXiv 2503.12329): each caption battles the caption of one of three baseline models; the judge sees the
image and a caption by a person. 600 images, 200 a baseline, whose score is (wins - losses) / 2, from -100 to 100.

--captions       one JSON object:      {"test_01258.jpg": "The image features ...", ...}
--battles        one JSON object:      {"test_01258.jpg": {"captions": {"human": "...", "GPT-4o-0806": "..."},
                                                           "ref_model": "GPT-4o-0806"}, ...}
--output         a JSON list of battles, which the original's caparena_auto_scores.py reads
--prompts        a folder with caparena.txt, the system prompt (system_prompt_with_ref of vlm_as_a_judge.py), and
                 caparena_request.txt ({caption_1}, {caption_2}, and {reference} or the original's {caption_ref})

judge:           gpt-4o-2024-08-06 judged the published numbers, with the original's prompts; ours are worded anew
data:            github.com/njucckevin/CapArena: caparena_auto_600.json and the 600 images (from DOCCI)
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    raw = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="evaluate.py", description=ABOUT, **raw)
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    common = _common()
    others = argparse.ArgumentParser(add_help=False)
    others.add_argument("--mend", action="store_true", help="mend the original's quirks (see the benchmark's module)")
    others.add_argument("--prompts", type=Path, metavar="DIR", help="judge prompts to use in place of ours")

    def add(name: str, about: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        short = about.split(":")[0].split(",")[0]
        return benchmarks.add_parser(name, help=short, description=about, parents=[*parents, common], **raw)

    score = add("bcapscore", BCAPSCORE)
    score.add_argument("--references", type=Path, required=True, metavar="FILE")
    score.add_argument("--images", type=Path, required=True, metavar="DIR")
    score = add("dcscore", DCSCORE, others)
    score.add_argument("--annotations", type=Path, required=True, metavar="FILE")
    score.add_argument("--images", type=Path, required=True, metavar="DIR")
    score = add("captionqa", CAPTIONQA, others)
    score.add_argument("--questions", type=Path, required=True, metavar="FILE")
    score.add_argument("--images", type=Path, metavar="DIR")
    score.add_argument("--seed", type=int, default=0, help="of the options' order; published: 0")
    score.add_argument("--max-tokens", type=int, default=4, help="of an answer")
    score = add("caparena", CAPARENA, others)
    score.add_argument("--battles", type=Path, required=True, metavar="FILE")
    score.add_argument("--images", type=Path, required=True, metavar="DIR")
    score.add_argument("--name", required=True, help="the model's name in the results")
    score.add_argument("--seed", type=int, default=0, help="of the order of two captions; the original has none")
    return parser.parse_args(arguments)


def _common() -> argparse.ArgumentParser:
    """What every benchmark takes."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--captions", type=Path, required=True, metavar="FILE")
    common.add_argument("--output", type=Path, required=True, metavar="PATH")
    judge = common.add_argument_group("judge")
    judge.add_argument("--judge-url", required=True, metavar="URL", help="OpenAI-compatible, http://host:port/v1")
    judge.add_argument("--judge-model", required=True, metavar="NAME")
    judge.add_argument("--judge-moved", action="store_true", help="the same judge as before has a new address")
    judge.add_argument("--api-key-env", metavar="VARIABLE", help="the environment variable that holds the key")
    judge.add_argument(
        "--dialect", action="append", default=[], metavar="KEY=VALUE",
        help="how its server differs from OpenAI's: token_limit=max_tokens, temperature=false, seed=false, "
        "replies=json_object, thinking_tokens=4096, extra_body={...}; may be repeated",
    )  # fmt: skip
    judge.add_argument("--concurrency", type=int, default=32, help="requests at once")
    judge.add_argument("--timeout", type=int, default=120, help="seconds a request may take")
    judge.add_argument("--max-retries", type=int, default=4, help="of a request without a usable reply")
    judge.add_argument("--max-unjudged", type=float, default=0.05, metavar="FRACTION", help="above it, exit status 3")
    judge.add_argument("--price-prompt", type=float, metavar="USD", help="a million prompt tokens")
    judge.add_argument("--price-completion", type=float, metavar="USD", help="a million completion tokens")
    captions = common.add_argument_group("captioning")
    captions.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint to caption the images with first")
    captions.add_argument("--caption-prompt", default=DEFAULT_PROMPT, metavar="TEXT")
    captions.add_argument("--caption-tokens", type=int, default=512, metavar="N")
    captions.add_argument("--max-model-len", type=int, default=4096, metavar="N")
    return common


# What errors of shared parts call a setting, and what it is called here.
OPTION_NAMES = {
    "model.path=": "--model ",
    "data.path=": "--references ",
    "data.image_root": "--images",
    "rollout.max_model_len": "--max-model-len",
    "rollout.max_tokens": "--caption-tokens",
    "lower data.max_pixels": "leave that picture out",
    "the judge's options: base_url": "--judge-url",
    "the judge's options: model": "--judge-model",
    "the judge's options: api_key_env": "--api-key-env",
    "the judge's options: concurrency": "--concurrency",
    "the judge's options: timeout_seconds": "--timeout",
    "the judge's options: max_retries": "--max-retries",
    "the judge's options: dialect.": "--dialect ",
    "rewards.endpoint.dialect.": "--dialect ",
    "endpoint.api_key_env": "--api-key-env",
    "api_key_env": "--api-key-env",
    "rewards.cache_dir=": "",
}


def dialect_of(settings: list[str]) -> dict[str, Any]:
    """`--dialect` as the endpoint's section has it. Raises UserError for one that is no KEY=VALUE."""
    dialect = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        try:
            dialect[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not equals:
            raise UserError(f"--dialect {setting!r} is not KEY=VALUE", remedy="write it like --dialect seed=false")
    return dialect


def in_options(text: str) -> str:
    """An error's text, speaking of the options of this command."""
    for key, option in OPTION_NAMES.items():
        text = text.replace(key, option)
    return text
