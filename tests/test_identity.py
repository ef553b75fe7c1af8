"""A run is its inputs: the same on every rank, the same when it goes on, and each place of a step its own captions."""

from dataclasses import replace

import pytest
from PIL import Image

from balcap_mega.algorithm.words import count_words
from balcap_mega.config.schema import RewardConfig
from balcap_mega.data.records import CaptionRecord
from balcap_mega.data.scenes import ScenesDataset
from balcap_mega.errors import UserError
from balcap_mega.rewards.factory import build_judge
from balcap_mega.rollout.engine import request_seed
from balcap_mega.rollout.replicas import Replica
from balcap_mega.rollout.rollouts import Rollout, RolloutGroup, SeenRecord
from balcap_mega.training.batches import Prompts
from balcap_mega.training.judging import Judging


def test_a_record_that_a_step_has_twice_gets_a_seed_and_a_judgement_for_each_place():
    """Its first place keeps the seed of a step that has it once, whichever engine draws it."""
    dataset = ScenesDataset(5, seed=0, split="train")
    prompts = Prompts(dataset, [4, 2, 4, 4])
    halves = [prompts.of(Replica(index, 2, 0)) for index in range(2)]
    mine = sorted([*halves[0], *halves[1]], key=lambda prompt: prompt.place)
    assert [(p.place, p.record_index, p.repeat) for p in mine] == [(0, 4, 0), (1, 2, 0), (2, 4, 1), (3, 4, 2)]
    assert mine == prompts.of(Replica(0, 1, 0))
    seeds = [request_seed(0, 7, prompt.record_index, prompt.repeat) for prompt in mine]
    assert len(set(seeds)) == 4 and seeds[:2] == [request_seed(0, 7, 4), request_seed(0, 7, 2)]

    judging = Judging(build_judge(RewardConfig()), prompts, count_words, timeout_seconds=60)
    texts = [record.reference for record in (dataset[4], dataset[2], dataset[0])] + ["Nothing."]
    groups = []
    for prompt, text in zip(mine, texts, strict=True):
        rollout = Rollout((1,), (-1.0,), text, True)
        judging.submit(prompt.place, 0, rollout)
        groups.append(RolloutGroup(prompt.place, (1,), (rollout,), SeenRecord.of(prompt.record_index, prompt.record)))
    scores = [caption.score.recall for _, [caption] in judging.scored(groups)]
    assert scores[0] == 1.0 and scores[1] == 1.0 and scores[2] < 1.0 and scores[3] == 0.0


def test_other_pixels_are_refused_by_both_hosts_names():
    record = CaptionRecord("a", Image.new("RGB", (8, 6), "green"), "Describe.", "A field.")
    here, there = (
        replace(SeenRecord.of(3, record), by="rank 0 on n0"),
        replace(SeenRecord.of(3, record), by="rank 1 on n1"),
    )
    here.refuse_unlike(there)
    for other in ("red", "green"):
        picture = Image.new("RGB", (6, 8) if other == "green" else (8, 6), other)
        changed = replace(SeenRecord.of(3, replace(record, image=picture)), by="rank 1 on n1")
        with pytest.raises(UserError, match=r"rank 0 on n0 and rank 1 on n1 .* record 3 is 'a' with other pixels"):
            here.refuse_unlike(changed)
    with pytest.raises(UserError, match="'a' here and 'b' there"):
        here.refuse_unlike(replace(there, id="b"))
