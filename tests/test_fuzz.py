"""Every format the program reads, damaged in ten thousand ways: it is read, or refused in one line, soon and small.

Each reader is called as the program calls it. All is drawn from seeds, so a failure repeats; it names its input.
FUZZ_FACTOR=20 in the environment tries twenty times as many.
"""

import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, PngImagePlugin

from balcap_mega.config.load import dump_config, load_config
from balcap_mega.config.preflight import check_data, check_model
from balcap_mega.config.schema import (
    DataConfig,
    JudgeEndpoint,
    ModelConfig,
    ParallelConfig,
    RewardConfig,
    RolloutConfig,
)
from balcap_mega.data.headers import MOST_PIXELS
from balcap_mega.data.images import DaliDecoder, PilDecoder
from balcap_mega.data.records import CaptionRecord
from balcap_mega.data.sources import build_datasets
from balcap_mega.errors import UserError
from balcap_mega.evaluation import bcapscore, caparena, captionqa, dcscore, dcscore_scoring
from balcap_mega.evaluation.captionqa_questions import plan, read_questions
from balcap_mega.evaluation.session import Spending, add_to_ledger, read_json
from balcap_mega.models.architecture import Architecture
from balcap_mega.models.families import FAMILIES
from balcap_mega.models.huggingface.files import check_checkpoint
from balcap_mega.parallel.platform import Platform
from balcap_mega.rewards.mllm.failures import Unusable
from balcap_mega.rewards.mllm.judge import MllmJudge
from tests.support.judge_server import Fault, JudgeServer, RuleJudge
from tests.support.mutations import mutate_bytes, mutate_json

FACTOR = int(os.environ.get("FUZZ_FACTOR", "1"))
ROOT = Path(__file__).parent.parent
SECONDS = 30  # for one input: what hangs, hangs longer
MEMORY = 2 * 2**30  # bytes beyond what the process has mapped already
TRIES: Counter[str] = Counter()


class Hung(BaseException):
    """No reader can take it for an error of its own."""


@contextmanager
def bounded() -> Iterator[None]:
    """Within, memory beyond MEMORY is refused and SECONDS a `tick` are all there are."""

    def hung(*_):
        raise Hung(f"still reading after {SECONDS} s")

    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, hung)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, limits[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def fuzz(name: str, count: int, make: Callable[[random.Random], object], read: Callable[[object], object]) -> None:
    """`read(make(rng))`, `count` times: each returns or raises one UserError of one line; both must occur."""
    outcomes: Counter[str] = Counter()
    with bounded():
        for number in range(count * FACTOR):
            value = make(random.Random(f"{name}/{number}"))
            signal.alarm(SECONDS)
            try:
                read(value)
                outcomes["read"] += 1
            except UserError as error:
                assert str(error).isprintable() and len(str(error)) < 4200, repr(str(error))
                outcomes["refused"] += 1
            except BaseException as error:
                error.add_note(f"{name}, input {number}: {value!r:.2000}")
                raise
            signal.alarm(0)
    TRIES[name] += sum(outcomes.values())
    assert outcomes["read"] and outcomes["refused"], outcomes


def written(path: Path, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    """A reader of bytes by way of the file `path`."""

    def through_file(content: bytes) -> object:
        path.write_bytes(content)
        return read(path)

    return through_file


def test_configs(tmp_path):
    texts = [path.read_bytes() for path in sorted((ROOT / "configs").glob("*.yaml"))]
    trees = [yaml.safe_load(text) for text in texts]
    overrides = ["rollout.group_size=4", "algorithm.weights={precision: 2}", "data.image_prefixes=[a, b]", "seed=1"]
    path, copy = tmp_path / "run.yaml", tmp_path / "copy.yaml"

    def make(rng):
        given = [rng.choice(overrides)]
        kind = rng.randrange(4)
        if kind == 0:
            given.append(mutate_bytes(rng.choice(overrides).encode(), rng).decode("utf-8", "replace"))
            return rng.choice(texts), given
        if kind == 1:
            return mutate_json(rng.choice(trees), rng), given
        return mutate_bytes(rng.choice(texts), rng), given

    def read(value):
        path.write_bytes(value[0])
        config = load_config(path, value[1])
        copy.write_text(dump_config(config), encoding="utf-8")
        assert load_config(copy) == config

    fuzz("config", 900, make, read)


def picture(size=(24, 17)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A folder of images, and what has no business in one: a pipe, a folder named like an image, an endless file."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "a").mkdir()
    for name in ("1.png", "a/2.jpg", "a/3.png"):
        picture().save(folder / name)
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    (folder / "endless.png").symlink_to("/dev/zero")
    return folder


NAMES = ("1.png", "a/2.jpg", "a/3.png", "pipe.png", "folder.png", "endless.png", "gone.png")


@pytest.mark.parametrize("source", ["sharegpt4v", "jsonl"])
def test_annotations(source, photos, tmp_path):
    question = {"from": "human", "value": "<image>\nWhat is this?"}
    rows = [
        {"id": str(i), "image": name, "conversations": [question, {"from": "gpt", "value": f"Thing {i}."}]}
        if source == "sharegpt4v"
        else {"image": name, "reference": f"Thing {i}.", "prompt": "What?", "id": str(i), "units": ["a", "b"]}
        for i, name in enumerate(NAMES)
    ]

    def make(rng):
        if source == "sharegpt4v":
            return mutate_json(rows, rng)
        lines = [json.dumps(row).encode() for row in rows]
        lines[rng.randrange(3)] = mutate_json(rng.choice(rows), rng)
        return b"\n".join(lines) if rng.random() < 0.7 else mutate_bytes(b"\n".join(lines), rng)

    def read(path):
        prefixes = ("a/",) if path.stat().st_size % 3 == 0 else ()
        config = DataConfig(
            source=source, path=str(path), image_root=str(photos), image_prefixes=prefixes, eval_size=1,
            max_missing_fraction=1.0,
        )  # fmt: skip
        check_data(config)
        for dataset in build_datasets(config, seed=0):
            for record in dataset.load(range(len(dataset))):
                assert record.image.mode == "RGB" and record.prompt and record.reference

    fuzz(source, 1300, make, written(tmp_path / "rows", read))


def image_files() -> dict[str, bytes]:
    """A small file of every format, with what hides in files: Exif, several pictures, text, profiles."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "v" * 200, zip=True)
    kinds = {
        "jpeg": ("JPEG", {"exif": exif}),
        "progressive": ("JPEG", {"progressive": True}),
        "cmyk": ("JPEG", {}),
        "png": ("PNG", {"pnginfo": text, "icc_profile": b"p" * 300, "exif": exif}),
        "palette": ("PNG", {}),
        "webp": ("WEBP", {"exif": exif}),
        "moving webp": ("WEBP", {"save_all": True, "append_images": [picture()]}),
        "bmp": ("BMP", {}),
        "gif": ("GIF", {"save_all": True, "append_images": [picture().rotate(90)]}),
        "mpo": ("MPO", {"save_all": True, "append_images": [picture()]}),
    }
    files = {}
    for name, (file_format, options) in kinds.items():
        buffer = io.BytesIO()
        mode = {"cmyk": "CMYK", "palette": "P"}.get(name, "RGB")
        picture().convert(mode).save(buffer, file_format, **options)
        files[name] = buffer.getvalue()
    return files


def with_checksums(png: bytes) -> bytes:
    """The same chunks with their checksums made right again, so that damage gets past them."""
    done, at = png[:8], 8
    while at + 12 <= len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4], "big")
        body = png[at + 4 : end - 4]
        done, at = done + png[at : at + 4] + body + zlib.crc32(body).to_bytes(4, "big"), end
    return done + png[at:]


@pytest.mark.parametrize(("decoder", "count"), [(PilDecoder, 2500), (DaliDecoder, 300)])
def test_images(decoder, count):
    """A picture in bounds, or None; a record's image is then replaced (see test_data_files)."""
    files, decode = image_files(), decoder()

    def make(rng):
        name = rng.choice(list(files))
        data = mutate_bytes(files[name], rng)
        return with_checksums(data) if name in ("png", "palette") and rng.random() < 0.7 else data

    def read(data):
        [image] = decode([data])
        if image is None:
            raise UserError("no picture", remedy="replace it")
        assert image.mode == "RGB" and 0 < image.width * image.height <= MOST_PIXELS

    fuzz(f"images by {decoder.__name__}", count, make, read)


@pytest.fixture(scope="module")
def model_folder(tiny_checkpoint, tmp_path_factory) -> Path:
    """A model whose weights lie in two files, so that it has an index."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(tiny_checkpoint("qwen2_5_vl"), folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(("name", "count"), [("index", 600), ("header", 700), ("config", 500)])
def test_model_folders(name, count, model_folder):
    file = {"index": "model.safetensors.index.json", "header": "one.safetensors", "config": "config.json"}[name]
    path = model_folder / file
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    architecture = Architecture.from_folder(model_folder)

    def make(rng):
        if name != "header":
            return mutate_json(json.loads(whole), rng)
        if rng.random() < 0.3:
            return mutate_bytes(whole[: 8 + length], rng) + whole[8 + length :]
        header = mutate_json(json.loads(whole[8 : 8 + length]), rng)
        claimed = len(header) if rng.random() < 0.8 else rng.choice((0, 1, 2**31, 2**62, 2**64 - 1))
        return claimed.to_bytes(8, "little") + header + whole[8 + length :]

    def read(_):
        check_model(ModelConfig(path=str(model_folder)), ParallelConfig(), RolloutConfig(max_model_len=512), FAMILIES)
        read_from = Architecture.from_folder(model_folder) if name == "config" else architecture
        check_checkpoint(model_folder, read_from)

    try:
        fuzz(f"model {name}", count, make, written(path, read))
    finally:
        path.write_bytes(whole)


@pytest.fixture(scope="module")
def run_checkpoint(tmp_path_factory) -> Iterator[Path]:
    """A checkpoint folder in the run's form around a small state in Megatron's, written by Megatron on one rank."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    folder = tmp_path_factory.mktemp("checkpoints")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    path = folder / "step_000001"
    (path / "megatron").mkdir(parents=True)
    state = {
        "weight": ShardedTensor.from_rank_offsets("weight", torch.arange(12.0).view(3, 4)),
        "extra": ShardedObject("layer._extra_state", torch.empty(0, dtype=torch.uint8), (1,), (0,)),
        "step": 1,
    }
    with Platform.resolve("cpu").megatron():
        dist_checkpointing.save(state, str(path / "megatron"))
    files = {}
    for file in sorted(path.rglob("*")):
        if file.is_file():
            content = file.read_bytes()
            files[str(file.relative_to(path))] = digest(content)
    manifest = {"step": 1, "layout": {"tensor": 1, "pipeline": 1, "data": 1}, "extra": {"a": 1}, "files": files}
    (path / "manifest.json").write_text(json.dumps(manifest))
    (folder / "latest").write_text("step_000001\n")
    yield folder
    torch.distributed.destroy_process_group()


def digest(content: bytes) -> dict:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize(
    ("name", "count"), [("latest", 100), ("manifest.json", 400), ("megatron/.metadata", 700), ("shard", 200)]
)
def test_run_checkpoints(name, count, run_checkpoint):
    """Found and verified, or passed over, or refused. A mutated index or shard has its right digest in the manifest."""
    from balcap_mega.training.checkpoint.format import _verify, latest_checkpoint

    step = run_checkpoint / "step_000001"
    [shard] = (step / "megatron").glob("*.distcp")
    path = run_checkpoint / name if name == "latest" else shard if name == "shard" else step / name
    manifest_path = step / "manifest.json"
    whole, manifest = path.read_bytes(), json.loads(manifest_path.read_text())
    original = manifest_path.read_bytes()

    def make(rng):
        if name == "manifest.json":
            return mutate_json(manifest, rng)
        return mutate_bytes(whole, rng)

    def read(content):
        path.write_bytes(content)
        if path not in (manifest_path, run_checkpoint / "latest"):
            manifest["files"][str(path.relative_to(step))] = digest(content)
            manifest_path.write_text(json.dumps(manifest))
        found = latest_checkpoint(run_checkpoint)
        if found is not None:
            _verify(found)

    try:
        fuzz(f"run {name}", count, make, read)
    finally:
        path.write_bytes(whole)
        manifest_path.write_bytes(original)


TRUTHS = ("There is a red car", "The sky is blue")
REPLIES = {
    "split": {"assertions": ["red car", "sky green"]},
    "verify": {"verdicts": "1R2W"},
    "cover": {"verdicts": "1Y"},
    "language": {"clarity": 10, "fluency": 8, "coherency": 9},
}
COMPONENT = {"split": "precision", "verify": "precision", "cover": "recall", "language": "linguistic"}


def test_judge_replies():
    """Over HTTP into the whole judge: a judgement, in which a component is missing only where a failure is counted."""

    def make(rng):
        name = rng.choice(list(REPLIES))
        content = json.dumps(REPLIES[name])
        if rng.random() < 0.6:
            content = mutate_json(REPLIES[name], rng).decode("utf-8", "replace")
        message = {"role": "assistant", "content": content, "refusal": None}
        body = {
            "id": "1",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1},
        }
        return name, json.dumps(body).encode() if rng.random() < 0.5 else mutate_json(body, rng)

    with JudgeServer(RuleJudge(TRUTHS)) as server:
        endpoint = JudgeEndpoint(base_url=server.base_url, model="judge", max_retries=0, timeout_seconds=20)
        judge = MllmJudge(RewardConfig(judge="mllm", endpoint=endpoint))
        record = CaptionRecord("photo", picture(), "Describe.", "There is a red car.", ("There is a red car",))

        def read(value):
            name, body = value
            server.requests.clear()
            server.faults[name] = [Fault(body=body)]
            before = judge.report()
            judgement = judge.submit(record, "There is a red car. The sky is green.").result(SECONDS)
            after = judge.report()
            missing = [component for component, value in judgement.components().items() if value is None]
            assert sum(after.failures.values()) - sum(before.failures.values()) == len(missing)
            assert all(0 <= value <= 1 for value in judgement.components().values() if value is not None)
            if missing:
                assert missing == [COMPONENT[name]]
                raise UserError("counted as missing", remedy="")

        fuzz("judge replies", 1200, make, read)
        judge.close()


EVALUATION: dict[str, tuple[object, bool, Callable[[Path], object]]] = {
    "captions": ({"a.png": "A cat.", "b.png": "A dog."}, False, lambda path: read_json(path, "", dict[str, str])),
    "questions": (
        [
            {
                "id": "a_1",
                "domain": "x",
                "questions": [{"question": "Is it?", "choices": ["yes", "no"], "answer": "no"}],
            },
            {"id": 2, "question": "What?", "choices": ["A", "B", 3], "answer": "B", "category": ["kind"]},
        ],
        False,
        lambda path: plan(read_questions(path), {"a_1": "A cat.", "2": "A dog."}, mend=True),
    ),
    "answers": (
        {"a_1": [{"score": 1.0, "is_correct": True, "is_cannot_answer": False, "category": "kind", "question": "x"}]},
        False,
        lambda path: captionqa.summarize(path, []),
    ),
    "battles": (
        {"a.png": {"captions": {"human": "A cat.", "gpt": "A cat!"}, "ref_model": "gpt"}},
        False,
        lambda path: caparena.draw_battles(caparena.read_battles(path), {"a.png": "Cat."}, "mine", 0),
    ),
    "judged battles": (
        [
            {
                "img": "a.png",
                "source1": "mine",
                "source2": "GPT-4o-0806",
                "caption1": "a",
                "caption2": "b",
                "ref": "c",
                "ref_model": "GPT-4o-0806",
                "judge": "Tie",
                "judge_reason": "Judgment: Tie",
            }
        ],
        False,
        lambda path: caparena.summarize(read_json(path, "", list[caparena.Battle]), "mine", mend=True),
    ),
    "annotations": (
        {"image_name": "a.png", "oracle_facts": ["A cat.", "A mat."], "oracle_caption": "A cat on a mat."},
        True,
        dcscore.read_annotations,
    ),
    "oracle captions": ({"image_path": "a.png", "caption": "x", "oracle_caption": "y"}, True, dcscore.read_captions),
    "dcscore result": (
        {
            "valid": True,
            "human_annotated_oracle_atomic_facts": [{"id": 0, "fact": "A cat."}],
            "eval_details": {
                "pred_atomic_facts": [{"fact": "A cat.", "relevance": 1}],
                "mappings_with_human_raw": ['```json[{"fact": "A cat.", "matched_oracle_id": "0"}]```'],
                "verified_results": [[{"fact": "A cat.", "verification": 1}]],
            },
        },
        False,
        lambda path: dcscore.summarize(path.parent, mend=True, rows=2),
    ),
    "b-CapScore results": (
        {"row": 0, "image": "1.png", "caption": "A cat.", "precision": 0.5, "recall": 0.5, "linguistic": None},
        True,
        lambda path: bcapscore.BCapScoreRun([None], {}, None, path)._latest(),
    ),
    "ledger": (
        {"requests": 1, "prompt_tokens": 2, "completion_tokens": 3, "dollars": 0.5},
        False,
        lambda path: add_to_ledger(path, Spending(1, 1, 1, 0.1)),
    ),
}


@pytest.mark.parametrize("name", EVALUATION)
def test_evaluation_files(name, tmp_path):
    example, in_lines, read = EVALUATION[name]

    def make(rng):
        if not in_lines:
            return mutate_json(example, rng)
        lines = [json.dumps(example).encode(), mutate_json(example, rng), b""]
        return b"\n".join(lines) if rng.random() < 0.7 else mutate_bytes(b"\n".join(lines), rng)

    fuzz(f"evaluation {name}", 150, make, written(tmp_path / "1.json", read))


def test_evaluation_replies():
    """What a judge writes into DCScore's and CapArena's answers is read, or the try is void."""
    facts = [{"fact": "A cat.", "relevance": 1, "matched_oracle_id": "0", "verification": 1}]

    def make(rng):
        text = f"Reason: good\nJudgment: Tie\n```json\n{json.dumps(facts)}\n```"
        inner = mutate_json(facts, rng).decode("utf-8", "replace")
        return rng.choice((mutate_bytes(text.encode(), rng).decode("utf-8", "replace"), f"```json\n{inner}\n```"))

    def read(text):
        reply = dcscore_scoring.parse_reply(text)
        try:
            caparena.winner(caparena.read_judgment(text), mend=True)
            trial = dcscore_scoring.score_trial(reply, 1, reply, reply, mend=True)
            assert 0 <= trial.f1 <= 1.01
        except (Unusable, *dcscore_scoring.BAD_REPLY) as error:
            raise UserError("void", remedy="") from error
        finally:
            json.dumps(reply, ensure_ascii=False).encode()

    fuzz("evaluation replies", 700, make, read)


def test_run_folders(tmp_path):
    """What a resumed run reads of its own folder."""
    from balcap_mega.training.heldout import read_result
    from balcap_mega.training.observe.metrics import METRICS_FILE, read_metrics

    row = {"step": 1, "reward/precision": 0.5, "policy/entropy": float("nan")}
    judgement = {"assertions": [], "covered": [True], "clarity": 1.0, "fluency": 1.0, "coherency": None}
    score = {"precision": 0.5, "recall": None, "linguistic": 1.0, "length": 3.0, "reference_length": 4.0}
    held_out = {"captions": [{"record_index": 0, "caption": "A cat.", "judgement": judgement, "score": score}]}
    fuzz(
        "metrics", 400, lambda rng: b"\n".join([json.dumps(row).encode(), mutate_json(row, rng), b""]),
        written(tmp_path / METRICS_FILE, lambda path: read_metrics(path.parent)),
    )  # fmt: skip
    fuzz(
        "held-out captions", 400, lambda rng: mutate_json(held_out, rng),
        written(tmp_path / "held_out_before.json", read_result),
    )  # fmt: skip


def test_ten_thousand_inputs_were_tried():
    """Of a whole run of this file; the tests above fill the count."""
    if len(TRIES) < 20:
        pytest.skip("only a part of this file ran")
    assert sum(TRIES.values()) >= 10_000, TRIES
