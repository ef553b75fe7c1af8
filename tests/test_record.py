"""A step's record: the same content gives the same bytes, reads back to the bit, is bounded, and never ends a run."""

import gzip
import json
import logging
import math
import struct
import threading
from dataclasses import replace

import pytest
import torch

from balcap_mega.algorithm.advantages import compute_advantages
from balcap_mega.config.schema import AlgorithmConfig, RecordConfig
from balcap_mega.data.scenes import ScenesDataset
from balcap_mega.errors import UserError
from balcap_mega.rewards.collect import CaptionScore, build_reward_batch
from balcap_mega.rewards.scenes import SceneJudge
from balcap_mega.rollout.rollouts import Rollout, RolloutGroup, SeenRecord
from balcap_mega.training.judging import JudgedCaption
from balcap_mega.training.record.format import FinishedCaptions, read_step, step_file, steps_on_record
from balcap_mega.training.record.page import as_text, find, write_page
from balcap_mega.training.record.recorder import WAITING, Recorder
from balcap_mega.training.record.replay import advantages_of, rewards_of

DATASET, JUDGE = ScenesDataset(8, 0, "train"), SceneJudge()
HOSTILE = "<script>alert(1)</script> A circle {{ 7 * 7 }}."


TRAINED = torch.tensor([-1 / 3, math.nan, -math.inf, -2.0, -1e-45, -0.7, 0.0], dtype=torch.float64)


def finished(step: int, texts=("", HOSTILE, "A lively mood fills the image.")) -> tuple[FinishedCaptions, object]:
    """Captions of two scenes as a step has them, odd numbers among them, and their rewards.

    The second is not trained on; of the first three the staleness is known.
    """
    groups, judged = [], []
    for place in range(2):
        record = DATASET[place + step]
        captions = (*texts, record.reference)
        logprobs = [(-0.1 / (place + 3), math.nan, -math.inf), (-1e-45, 0.0, -1 / 3), (-2.0,), (-0.7,)]
        rollouts = [
            Rollout(tuple(range(len(values))), values, text, finished=text != HOSTILE)
            for text, values in zip(captions, logprobs, strict=True)
        ]
        seen = SeenRecord.of(place + step, record)
        groups.append(RolloutGroup(place, (5, 6, 6, 6, 7), tuple(rollouts), seen))
        found = [JUDGE.judge(record, text) for text in captions]
        # A reward of another name, missing once.
        scores = [
            CaptionScore({**said.components(), "brevity": None if n == 0 else 1 / (n + 2)}, n + 1.0, 7.0)
            for n, said in enumerate(found)
        ]
        judged.append([JudgedCaption(*pair) for pair in zip(found, scores, strict=True)])
    rewards = build_reward_batch([[caption.score for caption in group] for group in judged])
    advantages = compute_advantages(rewards, AlgorithmConfig())
    numbers = [0, *range(2, 8)]
    captions = FinishedCaptions(step, groups, judged, rewards.names, advantages, numbers, [0.0, 1 / 7, 0.1])
    return replace(captions, trained_logprobs=TRAINED), rewards


def recorder(folder, **config) -> Recorder:
    return Recorder(folder, RecordConfig(**config), enabled=True)


def bits(values) -> list[bytes]:
    return [struct.pack("d", value) for value in values]


def test_reads_back_to_the_bit_and_the_same_step_is_the_same_bytes(tmp_path):
    captions, rewards = finished(3)
    for folder in (tmp_path / "a", tmp_path / "b"):
        write = recorder(folder)
        write(captions)
        write.finish()
    first = step_file(tmp_path / "a", 3).read_bytes()
    assert first == step_file(tmp_path / "b", 3).read_bytes()
    step = read_step(tmp_path / "a", 3)
    for group, original in zip(step.groups, captions.groups, strict=True):
        again = group.as_rollouts(original.seen.by)
        assert (again.seen, again.prompt_token_ids, again.place) == (
            original.seen, original.prompt_token_ids, original.place,
        )  # fmt: skip
        for rollout, theirs in zip(again.rollouts, original.rollouts, strict=True):
            assert (rollout.token_ids, rollout.text, rollout.finished) == (
                theirs.token_ids, theirs.text, theirs.finished,
            )  # fmt: skip
            assert bits(rollout.logprobs) == bits(theirs.logprobs)
    for name, value in vars(captions.advantages).items():
        assert torch.equal(getattr(advantages_of(step, torch.device("cpu")), name), value), name
    for name, value in vars(rewards).items():
        ours = getattr(rewards_of(step), name)
        assert torch.equal(ours, value) if isinstance(value, torch.Tensor) else ours == value, name
    assert step.groups[1].captions[3].judgement == captions.judged[1][3].judgement
    assert [c.components["brevity"] for c in step.groups[0].captions] == [None, 1 / 3, 1 / 4, 1 / 5]
    every = [caption for group in step.groups for caption in group.captions]
    assert every[1].trained_logprob is None, "it was not trained on"
    assert bits(c.trained_logprob for n, c in enumerate(every) if n != 1) == bits(TRAINED.tolist())
    assert [c.staleness for c in every] == [0.0, 1 / 7, 0.1, *[None] * 5]
    assert every[0].judgement.units == DATASET[3].units


def test_a_step_is_on_record_before_its_updates_and_whole_after_them(tmp_path, monkeypatch):
    """Of what waits for the disk, what was known before the updates gives way to what they add."""
    after, _ = finished(2)
    before = replace(after, trained_logprobs=None)
    write = recorder(tmp_path)
    write(before)
    write.finish()
    assert {c.trained_logprob for group in read_step(tmp_path, 2).groups for c in group.captions} == {None}
    slow, written = threading.Event(), []
    monkeypatch.setattr(
        "balcap_mega.training.record.recorder.write_step", lambda folder, step: (slow.wait(60), written.append(step))
    )
    for step in (3, 4):
        write(replace(before, step=step))
        write(replace(after, step=step))
    slow.set()
    write.finish()
    assert [step.header.step for step in written][-2:] == [3, 4] and 2 <= len(written) <= 3
    assert all(step.groups[0].captions[0].trained_logprob == -1 / 3 for step in written[-2:])


def test_files_of_the_version_before_are_still_read_and_of_a_later_one_are_refused(tmp_path):
    write = recorder(tmp_path)
    write(finished(1)[0])
    write.finish()
    header, *groups = map(json.loads, gzip.decompress(step_file(tmp_path, 1).read_bytes()).splitlines())
    for group in groups:
        for caption in group["captions"]:
            del caption["trained_logprob"], caption["staleness"], caption["judgement"]["units"]
    lines = [json.dumps(each).encode() + b"\n" for each in (header | {"version": 1}, *groups)]
    step_file(tmp_path, 1).write_bytes(gzip.compress(b"".join(lines)))
    text = "\n".join(as_text(find(tmp_path, 1, None, False)))
    assert DATASET[1].reference in text and "engine -2.000" in text
    assert not any(word in text for word in ("trainer", "staleness", "covered: ", "missed: "))
    write_page(tmp_path / "page.html", "run", "Captions", find(tmp_path, 1, None, False), DATASET)
    later = json.dumps(header | {"version": 3}).encode() + b"\n"
    step_file(tmp_path, 1).write_bytes(gzip.compress(b"".join([later, *lines[1:]])))
    with pytest.raises(UserError, match="format 3"):
        read_step(tmp_path, 1)


def test_extremes_are_the_best_and_the_worst(tmp_path):
    captions, _ = finished(1)
    write = recorder(tmp_path, keep="extremes")
    write(captions)
    write.finish()
    values = captions.advantages.values.view(2, 4)
    for group, row in zip(read_step(tmp_path, 1).groups, values, strict=True):
        assert {c.number for c in group.captions} == {int(row.argmax()), int(row.argmin())}


def test_the_oldest_steps_make_room_and_later_ones_are_dropped_where_a_run_goes_on(tmp_path):
    for step in (1, 2, 3, 4):
        write = recorder(tmp_path)
        write(finished(step)[0])
        write.finish()
    bound = sum(step_file(tmp_path, step).stat().st_size for step in (3, 4))
    write = recorder(tmp_path, max_gib=bound / 2**30)
    write(finished(4)[0])
    write.finish()
    assert steps_on_record(tmp_path) == [3, 4]
    recorder(tmp_path).go_on(3)
    assert steps_on_record(tmp_path) == [3]
    small = recorder(tmp_path, max_gib=1e-9)
    small(finished(5)[0])
    small.finish()
    assert steps_on_record(tmp_path) == [5], "the newest stays"


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    blocked = tmp_path / "rollouts"
    blocked.write_text("a file where the folder should be")
    write = recorder(blocked)
    write.go_on(0)
    for step in range(1, 2 * WAITING + 3):
        write(finished(step % 3)[0])
    write.finish()
    assert "is not on record" in caplog.text and all(r.levelno == logging.WARNING for r in caplog.records)
    Recorder(tmp_path / "none", RecordConfig(keep="none"), enabled=True)(finished(1)[0])
    assert not (tmp_path / "none").exists()


def test_damage_is_one_line(tmp_path):
    write = recorder(tmp_path)
    write(finished(1)[0])
    write.finish()
    whole = step_file(tmp_path, 1).read_bytes()
    lines = gzip.decompress(whole).splitlines(keepends=True)
    for content in (whole[:-40], b"no gzip", gzip.compress(b"".join(lines[:-1])), gzip.compress(b"[]\n"), b""):
        step_file(tmp_path, 1).write_bytes(content)
        with pytest.raises(UserError, match="damaged"):
            read_step(tmp_path, 1)
    with pytest.raises(UserError, match=r"step 9 is not on record.*1"):
        read_step(tmp_path, 9)


def test_captions_are_found_and_shown(tmp_path):
    write = recorder(tmp_path)
    for step in (1, 2):
        write(finished(step)[0])
    write.finish()
    shared = DATASET[2].id  # the second of step 1 and the first of step 2
    assert [each.step for each in find(tmp_path, None, shared, False)] == [1, 2]
    assert {each.step for each in find(tmp_path, None, None, False)} == {2}
    worst = find(tmp_path, 1, None, True)
    rewards = [each.captions[0].reward for each in worst]
    assert rewards == sorted(rewards) and len(worst) == 8
    text = "\n".join(as_text(worst))
    assert DATASET[1].reference in text and "brevity" in text and "not pointable: " in text
    assert "engine -0.700, trainer 0.000" in text and "staleness 0.14" in text
    assert "missed: " + "; ".join(DATASET[1].units) in text and "covered: " + "; ".join(DATASET[1].units) in text
    with pytest.raises(UserError, match="nobody"):
        find(tmp_path, 1, "nobody", False)

    page = tmp_path / "page.html"
    write_page(page, "run", "Captions", find(tmp_path, 1, None, False), DATASET)
    html = page.read_text()
    assert html.count("data:image/png") == 2 and "<script>" not in html and "&lt;<mark" in html
    for unit in DATASET[1].units:
        images = sum(unit in DATASET[number].units for number in (1, 2))
        assert html.count(f">{unit}<") == 4 * images, "the reference's facts stand below each caption of the image"
    write_page(page, "run", "Captions", find(tmp_path, 1, None, False), ScenesDataset(8, 1, "train"))
    assert "data:image/png" not in page.read_text(), "another record's picture is not shown"
