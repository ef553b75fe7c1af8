"""The transfers alone, without processes: every engine parameter written once, with what the trainer holds."""

from collections import Counter, defaultdict
from types import SimpleNamespace

import pytest

from balcap_mega.models.architecture import Architecture
from balcap_mega.models.families import FAMILIES
from balcap_mega.models.families.interface import Decoder
from balcap_mega.models.huggingface.table import Block
from balcap_mega.rollout.refit.tables import RefitTables, vision_tensors
from balcap_mega.rollout.refit.transfers import find_transfers


def qwen(**changes) -> Architecture:
    """A Qwen2.5-VL of odd sizes, by configuration alone."""
    vision = SimpleNamespace(
        hidden_size=64, intermediate_size=128, depth=2, in_channels=3, temporal_patch_size=2, patch_size=14,
        spatial_merge_size=2, out_hidden_size=64,
    )  # fmt: skip
    values = dict(
        family=FAMILIES["qwen2_5_vl"], num_layers=10, hidden_size=64, ffn_hidden_size=192, num_attention_heads=16,
        num_kv_heads=4, head_dim=4, vocab_size=1003, max_position_embeddings=128, rms_norm_eps=1e-6, rope_theta=1e4,
        decoder=Decoder(rotary_axes=(0, 1), qkv_bias=True), tie_word_embeddings=False, image_token_id=1,
        config=SimpleNamespace(vision_config=vision),
    )  # fmt: skip
    return Architecture(**values | changes)


def all_ranks(tables: RefitTables, bucket_elements: int = 20_000, **options):
    return [tables.transfers(rank, bucket_elements=bucket_elements, **options) for rank in range(tables.world_size)]


LAYOUTS = [
    # world, Megatron TP, PP, vLLM TP
    (1, 1, 1, 1),
    (2, 2, 1, 1),
    (2, 1, 2, 2),
    (4, 2, 2, 2),
    (8, 2, 2, 4),
    (12, 1, 3, 4),
    (16, 8, 2, 8),
]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("world,tensor,pipeline,engine", LAYOUTS)
def test_every_target_is_written_once_with_the_right_part(world, tensor, pipeline, engine, tied):
    tables = RefitTables(qwen(tie_word_embeddings=tied), world, tensor, pipeline, engine)
    everyone = all_ranks(tables)
    check_content(tables, everyone)
    check_agreement(everyone)


def check_content(tables, everyone):
    """Replay the transfers on labels (tensor, row, column) instead of numbers, row ends only: cheap and exact."""
    megatron, engines = tables.megatron_tables(), tables.engine_tables()
    for rank, each in enumerate(everyone):
        written = defaultdict(Counter)
        for bucket in each.buckets:
            for piece in (*bucket.local, *bucket.receives):
                source = label(megatron[piece.source_rank], piece.hf_name, piece.source)
                target = label(engines[rank], piece.hf_name, piece.target)
                assert source == target
                for row in range(*piece.target.rows):
                    written[piece.target.parameter][row] += piece.target.cols[1] - piece.target.cols[0]
        wanted = defaultdict(Counter)
        for block in engines[rank]:
            for row in range(*block.rows):
                wanted[block.parameter][row] += block.cols[1] - block.cols[0]
        assert written == wanted


def label(table: list[Block], hf_name, place):
    """The rectangle of the Hugging Face tensor that stands at `place`, found in the table itself."""
    for block in table:
        inside = (
            block.hf_name == hf_name
            and block.parameter == place.parameter
            and block.rows[0] <= place.rows[0] < place.rows[1] <= block.rows[1]
            and block.cols[0] <= place.cols[0] < place.cols[1] <= block.cols[1]
        )
        if inside:
            row, col = block.hf_rows[0] - block.rows[0], block.hf_cols[0] - block.cols[0]
            return hf_name, place.rows[0] + row, place.rows[1] + row, place.cols[0] + col, place.cols[1] + col
    raise AssertionError(f"{hf_name} does not stand at {place}")


def check_agreement(everyone):
    """Sender and receiver list the same pieces in the same order, bucket by bucket."""
    assert len({len(each.buckets) for each in everyone}) == 1
    for number in range(len(everyone[0].buckets)):
        sent, received = defaultdict(list), defaultdict(list)
        for each in everyone:
            for piece in each.buckets[number].sends:
                sent[each.rank, piece.target_rank].append(piece)
            for piece in each.buckets[number].receives:
                received[piece.source_rank, each.rank].append(piece)
        assert sent == received


@pytest.mark.parametrize("world,tensor,pipeline,engine", LAYOUTS)
def test_no_rank_receives_more_than_it_lacks_and_buckets_stay_small(world, tensor, pipeline, engine):
    tables = RefitTables(qwen(), world, tensor, pipeline, engine)
    limit = 5_000
    for each in all_ranks(tables, limit):
        assert each.received_elements == each.lower_bound_elements
        assert each.buffer_elements <= limit
        assert each.received_elements + each.local_elements == sum(each.target_elements.values())


def test_same_layout_moves_nothing():
    for each in all_ranks(RefitTables(qwen(), 1, 1, 1, 1)):
        assert each.received_elements == each.sent_elements == 0


def test_data_parallel_copies_share_the_sending():
    """Four copies of each of two stages: all copies of a stage send, none much more than the others."""
    sent = [each.sent_elements for each in all_ranks(RefitTables(qwen(num_layers=16, vocab_size=64), 8, 1, 2, 1))]
    for stage in (sent[:4], sent[4:]):
        assert min(stage) > 0.8 * max(stage)


def test_stages_send_at_the_same_time():
    everyone = all_ranks(RefitTables(qwen(num_layers=16, vocab_size=64), 2, 1, 2, 1), 50_000)
    both = sum(all(each.buckets[n].sends for each in everyone) for n in range(len(everyone[0].buckets)))
    assert both > 0.8 * len(everyone[0].buckets)


def test_frozen_tensors_stay():
    architecture = qwen()
    frozen = vision_tensors(architecture)
    for each in all_ranks(RefitTables(architecture, 4, 2, 2, 2), frozen=frozen):
        assert each.target_elements and not any(name.startswith("visual.") for name in each.target_elements)
        assert not any(p.hf_name in frozen for b in each.buckets for p in (*b.local, *b.sends, *b.receives))


def test_transfers_of_the_largest_layout_take_seconds():
    """Qwen2.5-VL-72B's language model, TP8 x PP8 to TP8: 64 ranks."""
    architecture = qwen(
        num_layers=80, hidden_size=8192, ffn_hidden_size=29568, num_attention_heads=64, num_kv_heads=8, head_dim=128,
        vocab_size=152064,
    )  # fmt: skip
    tables = RefitTables(architecture, 64, 8, 8, 8, vision_data_parallel=True)
    each = tables.transfers(37, bucket_elements=2**27, frozen=vision_tensors(architecture))
    assert each.received_elements == each.lower_bound_elements > 0
    assert each.buffer_elements <= 2**27
    assert 80 * 8192 * 29568 * 3 // 8 < sum(each.target_elements.values()) < 73e9 / 8


def test_a_target_nobody_holds_is_refused_before_anything_moves():
    source = [[Block("w", (0, 4), (0, 4), "p", (0, 4), (0, 4))]]
    target = [[Block("w", (0, 5), (0, 4), "q", (0, 5), (0, 4))]]
    with pytest.raises(ValueError, match="w: the engine needs"):
        find_transfers(source, target, rank=0, bucket_elements=100)
