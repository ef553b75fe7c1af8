"""Pictures prepared in the background: the same values and errors as without, in their step, within a bound."""

import threading
import time
import weakref

import pytest
import torch
from PIL import Image

from balcap_mega.algorithm.batch import Advantages
from balcap_mega.config.schema import AlgorithmConfig, DataConfig, PackingConfig
from balcap_mega.data.files import ImageFileDataset
from balcap_mega.data.images import PilDecoder
from balcap_mega.data.records import CaptionRecord
from balcap_mega.errors import UserError
from balcap_mega.models.processing import PromptProcessor
from balcap_mega.parallel.groups import ProcessGrid
from balcap_mega.rollout.replicas import Replica
from balcap_mega.rollout.requests import RenderedPrompt
from balcap_mega.rollout.rollouts import Rollout, RolloutGroup, SeenRecord
from balcap_mega.training.ahead import Ahead
from balcap_mega.training.batches import BatchBuilder, PromptLengths
from balcap_mega.training.prompts import Pictures, Prompts
from balcap_mega.training.recent import RecentRecords
from balcap_mega.training.truncation import lengths
from tests.test_data_files import rows, write_image

ALONE = Replica(0, 1, 0)


def settled(ahead: Ahead) -> None:
    """Wait until no job runs, and none can start."""
    deadline = time.monotonic() + 20
    while ahead._running or (any(not job.claimed for *_, job in ahead._waiting) and ahead._has_room()):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def pictures(threads: int, most_bytes: float = 2**20) -> Pictures:
    return Pictures(Ahead(threads, most_bytes), RecentRecords(most_bytes))


def folder(tmp_path, count: int, *bad: int):
    for number in range(count):
        write_image(tmp_path / f"{number}.png", (8 + number, 6))
    for number in bad:
        (tmp_path / f"{number}.png").write_bytes(b"no picture")
    return rows(*(f"{number}.png" for number in range(count)))


def rendered(index: int, record: CaptionRecord) -> RenderedPrompt:
    return RenderedPrompt((index, record.id, record.pixels), 5, 100)


def test_jobs_stop_at_the_bound_and_the_soonest_needed_go_on():
    ahead, done = Ahead(threads=2, most_bytes=40), []

    def begin(number, due):
        def work():
            done.append(number)
            return number

        return ahead.begin(work, lambda _: 10, due)

    jobs = [begin(number, (2,)) for number in range(12)]
    settled(ahead)
    assert len(done) == 4 and ahead._held == 40, "the bound"
    assert jobs[11].take() == 11, "what nobody has begun is done at once"
    sooner, before = begin("sooner", (1, 5)), len(done)
    assert jobs[0].take() == 0
    settled(ahead)
    assert done[before] == "sooner"
    assert [job.take() for job in (*jobs[1:11], sooner)] == [*range(1, 11), "sooner"]
    settled(ahead)
    assert ahead._held == 0 and sorted(map(str, done)) == sorted([*map(str, range(12)), "sooner"]), "each once"
    larger = [ahead.begin(lambda: 1, lambda _: 100), ahead.begin(lambda: 2, lambda _: 100)]
    settled(ahead)
    assert ahead._held == 100, "one that is larger than the bound is alone"
    assert [job.take() for job in larger] == [1, 2]


def test_what_is_given_up_holds_nothing_and_an_error_waits_to_be_asked_for():
    ahead, gate = Ahead(threads=1, most_bytes=1), threading.Event()

    def fail():
        gate.wait(20)
        raise OSError("a disk is gone")

    running, waiting = ahead.begin(fail, lambda _: 1), ahead.begin(lambda: 1 / 0, lambda _: 1)
    waiting.drop()
    gate.set()
    with pytest.raises(OSError, match="a disk is gone"):
        running.take()
    dropped = ahead.begin(lambda: 7, lambda _: 5)
    settled(ahead)
    assert ahead._held == 5
    dropped.drop()
    assert ahead._held == 0 and ahead.begin(lambda: 8, lambda _: 5).take() == 8


def test_its_end_waits_for_what_runs_and_starts_nothing():
    ahead, gate, done = Ahead(threads=2, most_bytes=100), threading.Event(), []

    def work(number):
        gate.wait(20)
        done.append(number)
        return number

    jobs = [ahead.begin(lambda number=number: work(number), lambda _: 1) for number in range(5)]
    while ahead._running < 2:
        time.sleep(0.005)
    ahead.close(timeout_seconds=0.05)
    assert any(worker.is_alive() for worker in ahead._workers), "what hangs holds nobody up"
    gate.set()
    ahead.close()
    assert sorted(done) == [0, 1] and not any(worker.is_alive() for worker in ahead._workers)
    assert [job.take() for job in jobs] == list(range(5))


@pytest.mark.parametrize("threads", [0, 3])
def test_a_bad_picture_counts_in_the_step_that_uses_it(tmp_path, threads, caplog):
    dataset = ImageFileDataset(folder(tmp_path, 8, 2, 5), tmp_path, max_missing_fraction=0.125, together=2)
    shared = pictures(threads)
    first, second = Prompts(dataset, [1, 2, 2], shared), Prompts(dataset, [5, 7], shared)
    second.prepare_requests(ALONE, rendered)  # long before the first step, which also has one
    settled(shared.ahead) if threads else None
    assert dataset.corrupt == 0 and not caplog.records
    requests = list(first.of(ALONE, rendered))
    assert [request.record.id for request in requests] == ["1.png", "3.png", "3.png"]
    assert [request.rendered.inputs for request in requests] == [
        (index, first[place].id, first[place].pixels) for place, index in enumerate([1, 2, 2])
    ]
    assert dataset.corrupt == 1 and [record.message.count("2.png") for record in caplog.records] == [1]
    with pytest.raises(UserError, match=r"2 are corrupt \(e\.g\. .*5\.png"):
        list(second.of(ALONE, rendered))
    second.close()
    settled(shared.ahead) if threads else None
    assert shared.ahead._held == 0


class Living:
    """Bytes of the objects that it was told of and that are alive, and the most there ever were."""

    def __init__(self):
        self.now, self.most, self.ever = 0, 0, 0
        self._lock = threading.Lock()

    def count(self, value, nbytes: int):
        self._add(nbytes)
        self.ever += nbytes
        weakref.finalize(value, self._add, -nbytes)
        return value

    def _add(self, nbytes: int) -> None:
        with self._lock:
            self.now += nbytes
            self.most = max(self.most, self.now)


class Tensors:
    """Stands for what a processor makes of a picture."""


@pytest.mark.parametrize("threads", [0, 4])
def test_pictures_of_a_step_never_hold_more_than_their_bound(tmp_path, threads):
    """However many a step has, and however slowly they are used: an engine that everything was copied for in advance
    ran out of memory. Decoded pictures and what was made of them."""
    side, factor, count, bound = 100, 8, 48, 30
    picture, alive = 3 * side * side, Living()
    for number in range(count):
        write_image(tmp_path / f"{number}.png", (side, side))

    class Decoder(PilDecoder):
        def __call__(self, encoded):
            return [alive.count(image, picture) for image in super().__call__(encoded)]

    dataset = ImageFileDataset(rows(*(f"{n}.png" for n in range(count))), tmp_path, decode=Decoder())
    config = DataConfig(threads=threads, ahead_gib=bound * picture / 2**30)
    shared = Pictures.of(config)

    def render(index, record):
        tensors = alive.count(Tensors(), factor * picture)
        return RenderedPrompt(tensors, 5, factor * picture)

    prompts = [Prompts(dataset, range(start, start + count // 2), shared) for start in (0, count // 2)]
    for step, each in enumerate(prompts):
        each.prepare_requests(ALONE, render, (step, 0))
    for each in prompts:
        for request in each.of(ALONE, render):
            time.sleep(0.002)
            assert request.rendered.inputs is not None
        del request
        assert [each[place].id for place in range(3)], "read again, if it must be"
    assert alive.ever > 8 * bound * picture
    one = (1 + factor) * picture
    # What is used right now, and what each thread had begun before anybody knew how large pictures are.
    assert alive.most <= bound * picture + (1 + threads) * one
    if threads:
        assert alive.most > bound * picture / 3


def test_each_picture_is_processed_on_the_rank_that_encodes_it(tiny_checkpoint):
    """G captions in several rows read the same pixels; of tensor-parallel ranks each has its share of the pictures, and
    a later pipeline stage, without a vision tower, has none. All have the same rows."""
    processor = PromptProcessor(tiny_checkpoint("qwen2_5_vl"))
    images = [Image.radial_gradient("L").resize(size) for size in ((90, 60), (47, 133), (200, 31))]
    records = [CaptionRecord(str(n), image, "Describe.", "") for n, image in enumerate(images)]
    captions = tuple(Rollout((5, 6, 7 + n), (-1.0,) * 3, "", True) for n in range(6))
    groups = [
        RolloutGroup(n, processor(record).prompt_token_ids, captions, SeenRecord.of(n, record))
        for n, record in enumerate(records)
    ]
    advantages = Advantages(torch.ones(18), torch.ones(1, 18), torch.zeros(18, dtype=torch.bool))
    config = PackingConfig(row_tokens=max(len(group.prompt_token_ids) for group in groups) + 8)
    sizes = [
        PromptLengths(lengths(group, AlgorithmConfig()), processor.image_tokens(group.prompt_token_ids))
        for group in groups
    ]

    def build(tensor_rank: int, tensor_size: int, stage: int, frozen: bool):
        """This rank's rows, and the places whose pictures it read."""
        grid = ProcessGrid(tensor_rank, tensor_size, stage, 2, 0, 1)
        builder = BatchBuilder(processor, config, grid, hidden_size=64, pad_to=1, frozen_vision=frozen)
        prompts = Prompts(records, range(3), shared := pictures(2, 2**30))
        builder.prepare(prompts, sizes, 1, (0, 1))
        [batches] = builder.from_rollouts(prompts, groups, advantages, 1).minibatches
        assert not any(map(prompts.expects_picture, range(3))), "what was prepared is what is used"
        return batches, {index for _, index in shared.recent._records}

    (whole, read), (later, none) = build(0, 1, 0, True), build(0, 1, 1, True)
    assert read == {0, 1, 2} and not none
    images = [image for microbatch in whole for image in microbatch.images]
    assert len(images) > 3 and len({id(image.pixel_values) for image in images}) == 3
    shared_out = [build(rank, 2, 0, True) for rank in range(2)]
    assert [sorted(read) for _, read in shared_out] in ([[0, 1], [2]], [[0, 2], [1]], [[0], [1, 2]], [[0, 1, 2], []])
    for batches in (later, *(batches for batches, _ in shared_out), build(1, 2, 0, False)[0]):
        for mine, theirs in zip(whole, batches, strict=True):
            assert torch.equal(mine.row.position_ids, theirs.row.position_ids)
            assert torch.equal(mine.row.tokens, theirs.row.tokens)
            for image, same in zip(mine.images, theirs.images, strict=True):
                assert torch.equal(image.image_grid_thw, same.image_grid_thw)
                assert not same.pixel_values.numel() or torch.equal(image.pixel_values, same.pixel_values)
    assert not any(image.pixel_values.numel() for microbatch in later for image in microbatch.images)
