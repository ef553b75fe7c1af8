"""Resharding of a Megatron policy into real vLLM engines: afterwards the engine's logprobs are the new weights'."""

import gc
import os
import re
import signal
import time
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForImageTextToText

from balcap_mega.config.schema import ModelConfig, ParallelConfig, RolloutConfig
from balcap_mega.errors import UserError
from balcap_mega.models.architecture import Architecture
from balcap_mega.models.huggingface.transfer import import_checkpoint
from balcap_mega.models.policy import build_policy
from balcap_mega.parallel.groups import destroy_parallel, initialize_parallel
from balcap_mega.parallel.platform import Platform
from balcap_mega.rollout.engine import RolloutEngine
from balcap_mega.rollout.refit import build_refit
from balcap_mega.rollout.refit import refit as refit_module
from balcap_mega.rollout.refit.peers import share_parameters
from balcap_mega.rollout.refit.pieces import checksums
from balcap_mega.rollout.refit.refit import Refit, RefitError
from balcap_mega.rollout.vllm_runtime.process import import_vllm
from tests.support.distributed import _rank_main, forking, launch, launcher_store
from tests.support.policy_cases import load_state
from tests.support.rollout_cases import largest_difference, make_prompts

TOLERANCE = 1e-4
BUCKET_BYTES = 2**16  # many buckets, tensors cut by them, and rows of a vocabulary that only one rank wants


def make_engine(folder, tensor_parallel: int, *, fp8: bool = False) -> RolloutEngine:
    config = RolloutConfig(
        group_size=2, max_tokens=12, max_model_len=512, tensor_parallel=tensor_parallel, fp8=fp8,
        verify_refit_every=1, timeout_seconds=60,
    )  # fmt: skip
    dtype = torch.bfloat16 if fp8 else torch.float32
    return RolloutEngine(folder, config, device=torch.device("cpu"), dtype=dtype, seed=0)


def new_weights(folder, seed: int):
    """transformers' model with weights that the engine has not seen."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return model


def make_policy(folder, tensor: int, pipeline: int, *, freeze_vision: bool = False, dtype: str = "float32"):
    """The policy at that layout, and the layout's config."""
    platform, parallel = Platform.resolve("cpu"), ParallelConfig(tensor=tensor, pipeline=pipeline, device="cpu")
    destroy_parallel()
    initialize_parallel(parallel, platform)
    model = ModelConfig(path=str(folder), dtype=dtype, freeze_vision=freeze_vision)
    return build_policy(Architecture.from_folder(folder), model, parallel, platform), parallel


def check_refit(folder, engine, tensor, pipeline, seed):
    """Refit new weights and compare logprobs, with images the engine has seen before under the old ones."""
    model, prompts = new_weights(folder, seed), make_prompts(2)
    policy, parallel = make_policy(folder, tensor, pipeline)
    load_state(policy, model.state_dict())
    refit = build_refit(policy, engine, parallel, bucket_bytes=BUCKET_BYTES)
    report = refit.run()
    assert report.received_bytes == report.lower_bound_bytes
    assert report.buckets > 2 and report.buffer_bytes <= 2 * BUCKET_BYTES
    groups = engine.sample(prompts, step=seed)
    assert largest_difference(model, folder, engine, prompts, groups) < TOLERANCE
    return refit, report


def one_rank(folders):
    for folder in folders:
        engine = make_engine(folder, 1)
        engine.sample(make_prompts(2), step=0)
        _, report = check_refit(folder, engine, 1, 1, seed=1)
        assert report.sent_bytes == report.received_bytes == 0 and min(report.seconds.values()) >= 0
        check_frozen_vision(folder, engine)
    check_wrong_checksum(folder, engine)
    check_every_parameter_is_accounted_for(folder, engine)


def check_every_parameter_is_accounted_for(folder, engine):
    """A parameter that the engine computes with and that no table lists is found at the start."""
    policy, parallel = make_policy(folder, 1, 1)
    transfers = build_refit(policy, engine, parallel)._transfers
    forgotten = "language_model.model.norm.weight"
    others = {name: elements for name, elements in transfers.target_elements.items() if name != forgotten}
    with pytest.raises(UserError, match=f"no update reaches: {forgotten}"):
        Refit(policy, engine, replace(transfers, target_elements=others), timeout_seconds=60)
    halved = transfers.target_elements | {forgotten: transfers.target_elements[forgotten] // 2}
    with pytest.raises(UserError, match=f"of another size: {forgotten}"):
        Refit(policy, engine, replace(transfers, target_elements=halved), timeout_seconds=60)


def check_frozen_vision(folder, engine):
    """Frozen weights are not sent: the engine keeps its own (those of seed 1), only the language model is new."""
    model, prompts = new_weights(folder, 2), make_prompts(2)
    policy, parallel = make_policy(folder, 1, 1, freeze_vision=True)
    load_state(policy, model.state_dict())
    build_refit(policy, engine, parallel).run()
    kept = new_weights(folder, 1).state_dict()
    is_vision = ("model.visual.", "model.vision_tower.", "model.multi_modal_projector.")
    model.load_state_dict({name: kept[name] for name in kept if name.startswith(is_vision)}, strict=False)
    groups = engine.sample(prompts, step=2)
    assert largest_difference(model, folder, engine, prompts, groups) < TOLERANCE


def check_wrong_checksum(folder, engine):
    policy, parallel = make_policy(folder, 1, 1)
    refit = build_refit(policy, engine, parallel, bucket_bytes=BUCKET_BYTES)
    as_sent = refit._expected_checksums
    refit._expected_checksums = lambda bucket: as_sent(bucket) + torch.eye(1, 2, dtype=torch.int64)
    with pytest.raises(RefitError, match=r"rank 0 in phase transfer, bucket 1 of \d+: .*not what the trainer sent"):
        refit.run()


def quantised(old, new):
    """The refit of `new` into an FP8 engine of `old`: as if it had loaded `new`, in the memory that its graphs know."""

    def parameters(engine):
        found = {}
        engine.llm.apply_model(lambda model: found.update(model.named_parameters()))
        return {name: parameter.detach() for name, parameter in found.items()}

    loaded, engine, prompts = make_engine(new, 1, fp8=True), make_engine(old, 1, fp8=True), make_prompts(2)
    before, expected = parameters(engine), parameters(loaded)
    assert sum(parameter.dtype == torch.float8_e4m3fn for parameter in before.values()) == 2 * 4  # of the inner layers
    policy, parallel = make_policy(new, 1, 1, dtype="bfloat16")
    import_checkpoint(new, policy)
    refit = build_refit(policy, engine, parallel, bucket_bytes=BUCKET_BYTES)
    for _ in range(2):
        refit.run()
        assert engine.sample(prompts, step=0) == loaded.sample(prompts, step=0)
        for name, parameter in parameters(engine).items():
            assert torch.equal(parameter.float(), expected[name].float()), name
            assert parameter.data_ptr() == before[name].data_ptr() and parameter.stride() == before[name].stride()


def several_ranks(cases):
    """cases: (folder, vLLM tensor parallelism, [(Megatron tensor, pipeline), ...]); one engine a case.

    Layouts take turns between the other ranks' memory, which ranks of one host read, and the process group.
    """
    import_vllm()
    from vllm.distributed.parallel_state import destroy_model_parallel

    for folder, engine_tensor, layouts in cases:
        destroy_model_parallel()  # vLLM's groups alone: the next engine has others
        engine = make_engine(folder, engine_tensor)
        engine.sample(make_prompts(2), step=0)
        for seed, (tensor, pipeline) in enumerate(layouts, start=1):
            refit_module.share_parameters = share_parameters if seed % 2 else lambda *unreachable: None
            check_refit(folder, engine, tensor, pipeline, seed)
        del engine
        gc.collect()
        torch.distributed.barrier()  # the trainer's groups outlive an engine


class DeafEngine:
    """Stands where the engine would in tests of what goes wrong between ranks: takes every bucket, writes nothing."""

    device, dtype, vision_data_parallel = torch.device("cpu"), torch.float32, False
    config = RolloutConfig(timeout_seconds=2)

    @property
    def llm(self):
        return self

    def collective_rpc(self, method, kwargs=None):
        return [0.0]

    def wake_weights(self):
        pass

    wake_cache = reset_caches = wake_weights


def silent_rank(folder, dies, reachable):
    """Rank 1 stalls, or is killed, on its way to the second bucket. Returns the error that the others see."""
    if not reachable:
        refit_module.share_parameters = lambda *unreachable: None
    policy, parallel = make_policy(folder, 1, torch.distributed.get_world_size())
    refit = build_refit(policy, DeafEngine(), parallel, bucket_bytes=BUCKET_BYTES)
    refit.run()
    if torch.distributed.get_rank() == 1:
        launch_bucket = refit._launch

        def silent(exchange, number):
            if number == 1:
                os.kill(os.getpid(), signal.SIGKILL) if dies else time.sleep(5)
            return launch_bucket(exchange, number)

        refit._launch = silent
    start = time.monotonic()
    with pytest.raises(RefitError) as error:
        refit.run()
    assert time.monotonic() - start < 10
    return str(error.value)


def numbers_of_peers(reachable):
    """What each rank reads of the other's parameters, two views of one storage, after that one has changed them."""
    rank = torch.distributed.get_rank()
    if rank == 1 and not reachable:
        os.getpid = lambda: 1
    numbers = torch.full((6,), rank + 5)
    mine = {"whole": numbers, "column": numbers.view(3, 2)[:, 1]}
    peers = share_parameters(mine, [(1 - rank, "column"), (1 - rank, "whole")])
    if peers is None:
        return None
    numbers[5] = 0
    torch.distributed.barrier()
    return {name: peers[1 - rank, name].tolist() for name in mine}


def test_ranks_read_each_others_parameters_where_all_reach_all():
    assert launch(2, numbers_of_peers, True) == [
        {"whole": [value] * 5 + [0], "column": [value, value, 0]} for value in (6, 5)
    ]
    assert launch(2, numbers_of_peers, False) == [None, None]


def test_refit_on_one_rank(tiny_checkpoint):
    tied = tiny_checkpoint("qwen2_5_vl", tie_word_embeddings=True)
    launch(1, one_rank, [tied, tiny_checkpoint("qwen3_vl"), tiny_checkpoint("llava")])


def test_refit_in_fp8_is_what_loading_is(tiny_checkpoint):
    launch(1, quantised, tiny_checkpoint("qwen2_5_vl"), tiny_checkpoint("qwen2_5_vl", seed=1))


def test_checksums_are_the_same_under_any_default_device():
    """An engine may make its GPU the default device while it updates weights."""
    values = [torch.arange(6.0).view(2, 3)]
    with torch.device("meta"):
        found, none = checksums(values, torch.float32), checksums([], torch.float32)
    assert torch.equal(found, checksums(values, torch.float32)) and none.device.type == "cpu"


def test_refit_between_layouts_on_two_ranks(tiny_checkpoint):
    qwen, tied, llava = (
        tiny_checkpoint("qwen2_5_vl"),
        tiny_checkpoint("qwen2_5_vl", tie_word_embeddings=True),
        tiny_checkpoint("llava"),
    )
    deepstack = tiny_checkpoint("qwen3_vl", tie_word_embeddings=True)
    layouts = [(qwen, 1, [(1, 1), (2, 1), (1, 2)]), (tied, 2, [(1, 2), (2, 1)]), (llava, 2, [(1, 2), (1, 1)])]
    layouts += [(deepstack, 1, [(1, 2)]), (deepstack, 2, [(2, 1)])]
    launch(2, several_ranks, layouts)


def test_refit_between_layouts_on_four_ranks(tiny_checkpoint):
    folder = tiny_checkpoint("qwen2_5_vl")
    launch(4, several_ranks, [(folder, 1, [(2, 2)]), (folder, 2, [(2, 2), (1, 2)])])


@pytest.mark.parametrize(
    "dies, reachable, phase",
    [
        # The sleeper finds what the others had sent before they gave up.
        (False, False, {1: r"transfer, bucket \d+ of \d+", 2: r"transfer, bucket [12] of \d+"}),
        (True, False, {2: r"transfer, bucket [12] of \d+"}),
        (True, True, {2: "finish"}),  # all have read what they want, and wait for the one that may not have
    ],
)
def test_a_silent_rank_stops_all_ranks_with_phase_and_bucket(tiny_checkpoint, dies, reachable, phase):
    """A collective ends for the ranks that have all their parts: with three of them, all wait for the silent one."""
    context = forking()
    results, store = context.Queue(), launcher_store()
    arguments = (3, store.port, silent_rank, (tiny_checkpoint("qwen2_5_vl"), dies, reachable), results)
    ranks = [context.Process(target=_rank_main, args=(rank, *arguments)) for rank in range(3)]
    for process in ranks:
        process.start()
    try:
        heard = set()
        while len(heard) < (2 if dies else 3):
            rank, message, error = results.get(timeout=120)
            if rank in heard:  # it has found its peers gone, on its way out
                continue
            heard.add(rank)
            assert error is None, error
            where = phase.get(rank, phase[2])
            assert re.match(rf"refit stopped on rank {rank} in phase {where}: ", message), message
    finally:
        for process in ranks:
            process.kill()
            process.join()
