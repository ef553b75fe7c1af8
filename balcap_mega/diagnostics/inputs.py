"""Checks of a run's configuration, data, judge and checkpoint, each of which is used once."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter

from balcap_mega.config.preflight import check_batch, check_device, check_model, check_output
from balcap_mega.config.preflight import check_data as check_data_files
from balcap_mega.config.schema import JudgeEndpoint, RewardConfig, RunConfig
from balcap_mega.data.inputs import RunInputs, missing_on_one, refuse_too_few, refuse_unasked
from balcap_mega.data.records import CaptionRecord
from balcap_mega.data.sources import build_datasets
from balcap_mega.diagnostics.finding import Finding, check, fail, ok, warn
from balcap_mega.models.architecture import Architecture
from balcap_mega.models.families import FAMILIES
from balcap_mega.models.huggingface.files import check_checkpoint as check_tensors
from balcap_mega.models.huggingface.fingerprint import checkpoint_digest
from balcap_mega.models.huggingface.hub import with_fetched_model
from balcap_mega.models.huggingface.tensors import huggingface_shapes
from balcap_mega.models.processing import PromptProcessor
from balcap_mega.parallel.host import node_name
from balcap_mega.rewards.factory import build_own
from balcap_mega.rewards.mllm.judge import MllmJudge
from balcap_mega.rewards.mllm.measure import measure

RECORDS = 8  # decoded for a look
MOST_ABSENT = 10_000  # images that are told to the first node
JUDGE_SECONDS = 30  # a reply may take, here
JUDGED_EACH = 2  # captions of each record


@check("model")
def check_fetched(config: RunConfig, fetched: list[RunConfig]) -> Finding:
    """Is the model here, or can the Hub's be fetched? Appends the configuration with its folder to `fetched`."""
    fetched.append(with_fetched_model(config))
    return ok(f"{config.model.path} at commit {fetched[0].model.revision} lies in {fetched[0].model.path}")


@check("config")
def check_config(config: RunConfig, world_size: int) -> Finding:
    """Does it fit `world_size` ranks, this node's devices and what its output folder holds already?"""
    check_batch(config, world_size)
    check_device(config)
    resuming = check_output(config)
    what = f"goes on with the run in {config.output_dir}" if resuming else f"starts a new run in {config.output_dir}"
    return ok(f"fits {world_size} ranks; {what}")


@dataclass(frozen=True)
class NodeInputs:
    """What one node reads. absent: the first images that it does not have."""

    node: str
    inputs: RunInputs
    absent: tuple[str, ...]


NODE_INPUTS = TypeAdapter(NodeInputs)


@check("data")
def check_data(config: RunConfig, records: list[CaptionRecord], read: list[NodeInputs]) -> Finding:
    """Do the first records decode? Appends them to `records`, and what this node has to `read`."""
    check_data_files(config.data)
    train, held_out = build_datasets(config.data, config.seed)
    refuse_too_few(config, len(train))
    for dataset in (train, held_out):
        refuse_unasked(config, dataset)
    checkpoint = checkpoint_digest(config.model.path) if config.model.path else None
    absent = getattr(train, "absent", ())[:MOST_ABSENT]
    read.append(NodeInputs(node_name(), RunInputs.of(train, held_out, checkpoint), absent))
    start = time.monotonic()
    records += [train[index] for index in range(min(RECORDS, len(train)))] + [held_out[0]]
    milliseconds = 1000 * (time.monotonic() - start) / len(records)
    width, height = records[0].image.size
    detail = f"{len(train)} records to train on, {len(held_out)} held out; the first is {width} x {height}"
    corrupt = getattr(train, "corrupt", 0)
    if corrupt:
        return warn(f"{corrupt} of the first {RECORDS} images are corrupt", "replace them")
    return ok(f"{detail}, {milliseconds:.0f} ms an image")


@check("same inputs")
def compare_inputs(read: Sequence[NodeInputs]) -> Finding:
    """Do all nodes read the same rows, images and checkpoint as the first?"""
    first, *others = read
    for other in others:
        if different := first.inputs.differences(other.inputs):
            where = missing_on_one((first.node, first.absent), (other.node, other.absent))
            return fail(
                f"{first.node} and {other.node} differ: {'; '.join(different.values())}{where}",
                "give all nodes the same data.path, data.image_root and model.path",
            )
    return ok(f"rows, images and checkpoint are the same on {len(read)} nodes")


@check("prompts")
def check_prompts(config: RunConfig, records: list[CaptionRecord]) -> Finding:
    """Does the checkpoint's chat template take images, and do the first records leave the engine room for captions?"""
    processor = PromptProcessor(config.model.path, pad_to_square=config.data.pad_to_square)
    tokens = [processor.check(record) for record in records]
    most = config.rollout.max_model_len
    if max(tokens) >= most:
        count = sum(length >= most for length in tokens)
        remedy = "raise rollout.max_model_len, or shrink the pictures by data.max_pixels"
        return fail(f"{count} of the first {len(tokens)} records take {most} tokens or more", remedy)
    seen = min(processor.seen_share(record.image.size) for record in records)
    if seen < 1:
        return warn(
            f"the checkpoint's processor cuts pictures to their centre: of one of the first {len(tokens)} it leaves "
            f"{100 * seen:.0f} %, while judge and reference cover the whole",
            "set data.pad_to_square=true",
        )
    return ok(f"of {min(tokens)} to {max(tokens)} tokens in the first {len(tokens)} records, of {most}")


@check("judge")
def check_judge(config: RunConfig, records: list[CaptionRecord]) -> Finding:
    """Does the judge answer? Measures the latency of small questions, then its rate on the run's own pictures."""
    judge = MllmJudge(hurried_judge(config.rewards), sharers=1)
    try:
        start = time.monotonic()
        judge.check()
        latency = (time.monotonic() - start) / len(config.rewards.questions)
        if not records:
            return warn(f"{config.rewards.endpoint.model} answers in {latency:.2f} s; no image to judge", "see data")
        rate = measure(judge, records, JUDGED_EACH, timeout_seconds=4 * JUDGE_SECONDS)
    finally:
        judge.close()
    if rate.complete < rate.captions:
        why = ", ".join(f"{reason} x{count}" for reason, count in rate.failures.items())
        remedy = "serve a model that takes images, gives JSON-schema output, and has the context for both"
        left = rate.captions - rate.complete
        return fail(f"{rate.model} answers text in {latency:.2f} s but judges {left} captions in part ({why})", remedy)
    return ok(
        f"{rate.model} answers in {latency:.2f} s, and judges {rate.captions_per_second:.2f} captions a second of "
        f"this run's images, {rate.captions} at once"
    )


@check("rewards")
def check_own_rewards(config: RunConfig) -> Finding:
    """Do the rewards of one's own pass the checks that they make before a run?"""
    own = build_own(config.rewards)
    for reward in own.values():
        reward.close()
    return ok(f"{', '.join(own)} can be asked")


def hurried_judge(rewards: RewardConfig) -> RewardConfig:
    """The same judge with a short timeout, without retries and cache."""

    def hurried(endpoint: JudgeEndpoint) -> JudgeEndpoint:
        seconds = min(JUDGE_SECONDS, endpoint.timeout_seconds)
        return endpoint.model_copy(update={"timeout_seconds": seconds, "max_retries": 0})

    changed = {
        "endpoint": hurried(rewards.endpoint),
        "cache_dir": None,
        **{
            name: {key: hurried(endpoint) for key, endpoint in getattr(rewards, name).items()}
            for name in ("component_endpoints", "question_endpoints")
        },
    }
    return rewards.model_copy(update=changed)


@check("checkpoint")
def check_checkpoint(config: RunConfig) -> Finding:
    """Is every tensor there, whole, in its shape, and can the layout cut it? Reads headers only."""
    check_model(config.model, config.parallel, config.rollout, FAMILIES)
    architecture = Architecture.from_folder(config.model.path)
    architecture.check_layout(config.parallel)
    stored = check_tensors(config.model.path, architecture)
    size = sum(math.prod(tensor.shape) for tensor in stored.values()) / 1e9
    files = len({tensor.file for tensor in stored.values()})
    return ok(f"{architecture.family.name}, {size:.2f} billion parameters in {files} files")


def count_parameters(folder: str) -> int | None:
    """From config.json; None if that cannot be read, which is for `check_checkpoint` to report."""
    try:
        architecture = Architecture.from_folder(folder)
    except Exception:
        return None
    return sum(math.prod(shape) for shape in huggingface_shapes(architecture).values())
