"""The judge hides its latency: the figures of benchmarks/judge.py, on a small scale."""

from benchmarks.judge import judge_all, judge_one_by_one, judging, make_captions, serving, step


def test_64_at_once_are_20_times_as_fast_as_one_after_another():
    captions = make_captions(prompts=32, group=8)
    with serving(latency=0.2) as address:
        with judging(address, concurrency=1) as judge:
            single = judge_one_by_one(judge, captions[:2]) / 2
        with judging(address, concurrency=64) as judge:
            together = judge_all(judge, captions) / len(captions)
    assert single / together >= 20


def test_generation_that_lasts_longer_hides_nine_tenths_of_the_judging():
    """The last caption's two requests are what cannot be hidden: 5 % of this judging, so 5 % are for the machine."""
    captions = make_captions(prompts=10, group=8)
    with serving(latency=0.2) as address:
        with judging(address, concurrency=8) as judge:
            alone = judge_all(judge, captions)
        with judging(address, concurrency=8) as judge:
            overlapped = step(judge, captions, generation=1.5 * alone)
    assert 1 - (overlapped - 1.5 * alone) / alone >= 0.9
