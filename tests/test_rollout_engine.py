"""The real vLLM engine in this process, and over two ranks: logprobs, seeds, banned tokens, callbacks, replicas."""

from contextlib import nullcontext
from dataclasses import replace
from itertools import chain, pairwise
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText

from balcap_mega.config.schema import RolloutConfig
from balcap_mega.errors import UserError
from balcap_mega.models.families import FAMILIES
from balcap_mega.rollout import generation
from balcap_mega.rollout.engine import RolloutEngine
from balcap_mega.rollout.requests import RolloutRequest, request_seed
from balcap_mega.rollout.vllm_runtime.process import process_state_kept
from tests.support.distributed import launch
from tests.support.rollout_cases import largest_difference, make_prompts, reference_logits

TOLERANCE = 1e-4


def make_engine(folder, **options) -> RolloutEngine:
    config = RolloutConfig(**{"group_size": 4, "max_tokens": 40, "max_model_len": 512, "temperature": 0.7} | options)
    return RolloutEngine(folder, config, device=torch.device("cpu"), dtype=torch.float32, seed=3)


def load(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def token_ids(groups):
    return [[rollout.token_ids for rollout in group.rollouts] for group in groups]


def check_one_rank(folders):
    """Everything that one engine on one rank promises, in one process to load vLLM once."""
    for folder in folders:
        set_num_threads, generator = torch.set_num_threads, torch.get_rng_state()
        engine, prompts, model = make_engine(folder), make_prompts(10), load(folder)

        finished, busy = {}, []

        def on_finished(place, number, rollout, engine=engine, finished=finished, busy=busy):
            finished[place, number] = rollout
            busy.append(engine.llm.has_unfinished_requests())

        groups = engine.sample(prompts, step=5, on_finished=on_finished)
        assert largest_difference(model, folder, engine, prompts, groups) < TOLERANCE
        assert finished == {(g.place, n): r for g in groups for n, r in enumerate(g.rollouts)}
        assert len(finished) == 40 and any(busy)  # captions are handed out while others still generate

        # Seeds: the same again, also in other company; another step, another draw; members differ.
        assert token_ids(engine.sample(prompts, step=5)) == token_ids(groups)
        assert token_ids(engine.sample(prompts[6:3:-1], step=5)) == token_ids(groups[6:3:-1])
        assert token_ids(engine.sample(prompts, step=6)) != token_ids(groups)
        assert all(len(set(group)) > 1 for group in token_ids(groups))

        # Of some 380 tokens, about equally likely to a random model, no media token in a thousand drawn.
        banned = set(engine.processor.banned_token_ids)
        assert engine.processor._config.image_token_id in banned
        drawn = list(chain.from_iterable(chain.from_iterable(token_ids(groups))))
        assert len(drawn) > 1000 and not banned.intersection(drawn)
        ends = engine.processor.eos_token_ids
        for rollout in finished.values():
            assert rollout.finished == (rollout.token_ids[-1] in ends) and (
                rollout.finished or len(rollout.token_ids) == 40
            )

        for prompt, group in zip(prompts[:3], engine.greedy(prompts[:3]), strict=True):
            (logits,) = reference_logits(model, folder, engine, prompt, group)
            logits[:, list(banned)] = -torch.inf
            assert group.rollouts[0].token_ids == tuple(logits.argmax(-1).tolist())

        check_prompts_go_in_while_others_generate(engine, prompts)

        engine.config = engine.config.model_copy(update={"timeout_seconds": 0})
        with pytest.raises(TimeoutError, match=r"still waiting for 3 records \(100, 107, 114\)"):
            engine.sample(prompts[:3], step=5)
        assert not engine.llm.has_unfinished_requests()
        engine.config = engine.config.model_copy(update={"timeout_seconds": 60})
        assert token_ids(engine.sample(prompts[:3], step=5)) == token_ids(groups[:3])

        with pytest.raises(RuntimeError, match="a caption still to generate"):
            engine.sample(prompts, step=5, on_finished=lambda *_, engine=engine: engine.reset_caches())
        engine.reset_caches()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine.llm, "step", lambda step=engine.llm.step: list(map(gave_up, step())))
            with pytest.raises(RuntimeError, match=r"gave up caption \d of record 1\d\d \(error\)"):
                engine.sample(prompts[:3], step=5)
        assert not engine.llm.has_unfinished_requests()

        huge = RolloutRequest(1, replace(prompts[0].record, image=prompts[0].record.image.resize((1400, 1400))), 1)
        if folder.name.startswith("qwen"):  # LLaVA scales every image to one size
            with pytest.raises(UserError, match=r"record 1 does not fit rollout\.max_model_len=512"):
                engine.sample([prompts[1], huge], step=5)
            assert not engine.llm.has_unfinished_requests()

        assert torch.set_num_threads is set_num_threads and torch.equal(torch.get_rng_state(), generator)

    # A bfloat16 model's logits are tempered in float32, as the trainer does.
    [processor] = engine.llm.apply_model(lambda model: model.get_language_model().logits_processor)
    processor.logits_as_input, logits = True, 30 * torch.randn(3, 50, dtype=torch.bfloat16)
    assert torch.equal(processor(None, logits.clone()), logits.float() * (1 / 0.7))


def check_prompts_go_in_while_others_generate(engine, prompts):
    """Bit for bit as if all had been submitted at first, as long as vLLM's queue has more than its next step takes."""
    scheduler, everything = engine.llm.engine_core.engine_core.scheduler, engine.step_tokens
    steps, ended = [], []

    def sample(prompts):
        """The groups; after how many engine steps each prompt was asked for, and how many captions had ended."""
        steps.clear(), ended.clear()
        asked = []

        def coming():
            for prompt in prompts:
                asked.append((len(steps), len(ended)))
                yield prompt

        groups = engine.sample(coming(), step=5, on_finished=lambda *caption: ended.append(caption))
        return groups, *zip(*asked, strict=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.llm, "step", lambda step=engine.llm.step: steps.append(1) or step())
        patch.setattr(scheduler, "max_num_scheduled_tokens", 128)
        expected, asked, _ = sample(prompts)
        assert asked == (0,) * len(prompts)
        patch.setattr(engine, "step_tokens", 128)
        groups, asked, _ = sample(prompts)
        assert asked[0] == 0 < asked[-1]
        assert groups == expected
        patch.setattr(generation, "MOST_BYTES", 1)
        groups, _, before = sample(prompts[:3])
        assert token_ids(groups) == token_ids(expected[:3]) and before == (0, 4, 8)
    assert engine.step_tokens == everything


def gave_up(output):
    """What vLLM reports of a request that failed inside."""
    for completion in output.outputs:
        completion.finish_reason = completion.finish_reason and "error"
    return output


def check_two_ranks(folders):
    """Tensor-parallel engines; both ranks must see the same captions."""
    seen = []
    for folder in folders:
        engine, prompts = make_engine(folder, tensor_parallel=2, temperature=1.0, max_tokens=12), make_prompts(4)
        groups = engine.sample(prompts, step=0)
        assert largest_difference(load(folder), folder, engine, prompts, groups) < TOLERANCE
        seen.append(token_ids(groups))
    return seen


def test_engine_on_one_rank(tiny_checkpoint):
    launch(1, check_one_rank, [tiny_checkpoint(family) for family in FAMILIES])


def test_engine_over_two_ranks(tiny_checkpoint):
    first, second = launch(2, check_two_ranks, [tiny_checkpoint(family) for family in FAMILIES])
    assert first == second


def test_the_learners_stream_stays_current(monkeypatch):
    """Whatever stream vLLM leaves behind, and with its work done first."""
    device = torch.device("cuda")
    learners, engines = (SimpleNamespace(waited=[]) for _ in range(2))
    learners.wait_stream = learners.waited.append
    current = [learners]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", current.append)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
    with process_state_kept(device):
        torch.cuda.set_stream(engines)
    assert current[-1] is learners and learners.waited == [engines]


def test_request_seeds_are_far_apart():
    seeds = {request_seed(run, step, record) for run in range(3) for step in range(20) for record in range(50)}
    ordered = sorted(seeds)
    assert len(seeds) == 3000 and max(seeds) < 2**62
    assert min(b - a for a, b in pairwise(ordered)) > 1000  # a group's members take the numbers that follow
