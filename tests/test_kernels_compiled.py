"""Every kernel compiled ahead of time for an H100, without one: registers, spills and how wide its loads are."""

import os
import re
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="Triton's interpreter replaces its compiler"
)

FLOATS = {"fp32": 4, "bf16": 2}


def compile_for_h100(kernel, types: dict[str, str], constants: dict, num_warps: int, folder: Path) -> dict:
    """Registers, bytes of stack and local memory, and the machine code. A `*` or `%` in a type says divisible by 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types[name].removeprefix("%")
        if signature[name][0] == "*" or types.get(name, "").startswith("%"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})

    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"

    def tool(name: str, *arguments: str) -> str:
        command = [tools / name, *arguments, cubin]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", tool("cuobjdump", "-res-usage")))
    return {name.lower(): int(value) for name, value in usage.items()} | {"code": tool("nvdisasm", "-c")}


def assert_no_spills(found: dict) -> None:
    assert found["stack"] == found["local"] == 0
    assert not re.findall(r"\b(?:LDL|STL)\b", found["code"])
    assert 0 < found["reg"] < 255


def assert_streams_in_128_bits(found: dict, logits_per_thread: int, element_bytes: int, stores: bool) -> None:
    """All of a thread's share of a block moves in 128-bit accesses; what else it loads is one scalar a row each."""
    wide = logits_per_thread * element_bytes // 16
    assert len(re.findall(r"\bLDG\.E\.128\b", found["code"])) == wide
    assert len(re.findall(r"\bSTG\.E\.128\b", found["code"])) == (wide if stores else 0)
    scalars = len(re.findall(r"\bLDG\b", found["code"])) - wide
    assert scalars <= 5, "narrow loads beside the row's scalars"


@pytest.mark.parametrize("dtype", FLOATS)
def test_logit_statistics(dtype, tmp_path):
    from balcap_mega.kernels import lm_head

    types = {
        "logits": f"*{dtype}", "targets": "*i64", "local": "*fp32", "stride": "%i32", "columns": "i32",
        "first_column": "i32", "rows": "i32", "scale": "fp32",
    }  # fmt: skip
    constants = {"BLOCK": lm_head.STATISTICS_BLOCK}
    found = compile_for_h100(lm_head.statistics_kernel, types, constants, lm_head.NUM_WARPS, tmp_path)
    assert_no_spills(found)
    share = lm_head.STATISTICS_BLOCK // (32 * lm_head.NUM_WARPS)
    assert_streams_in_128_bits(found, share, FLOATS[dtype], stores=False)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("with_entropy", [False, True])
def test_logits_to_gradient(dtype, with_entropy, tmp_path):
    from balcap_mega.kernels import lm_head

    types = {
        "logits": f"*{dtype}", "targets": "*i64", "log_normaliser": "*fp32", "entropy": "*fp32", "d_logprobs": "*fp32",
        "d_entropy": "*fp32", "stride": "%i32", "columns": "i32", "first_column": "i32", "scale": "fp32",
    }  # fmt: skip
    constants = {"ENTROPY": with_entropy, "BLOCK": lm_head.GRADIENT_BLOCK} | (
        {} if with_entropy else {"d_entropy": None}
    )
    found = compile_for_h100(lm_head.gradient_kernel, types, constants, lm_head.NUM_WARPS, tmp_path)
    assert_no_spills(found)
    share = lm_head.GRADIENT_BLOCK // (32 * lm_head.NUM_WARPS)
    assert_streams_in_128_bits(found, share, FLOATS[dtype], stores=True)


@pytest.mark.parametrize("importance", ["truncate", "token_band", "sequence_band"])
@pytest.mark.parametrize("everything", [False, True])
def test_policy_loss(everything, importance, tmp_path):
    from balcap_mega.kernels import policy_loss

    kernel = policy_loss.policy_loss_kernel
    scalars = (
        "clip_low", "clip_high", "dual_clip", "kl_weight", "log_cap", "log_lower", "log_upper", "entropy_weight",
        "max_log_ratio",
    )  # fmt: skip
    types = {
        **dict.fromkeys(kernel.arg_names, "*fp32"), **dict.fromkeys(scalars, "fp32"),
        **dict.fromkeys(("sequence_ids", "token_index"), "*i64"),
        "normaliser": "*i64", "counter": "*i32", "R": "i32", "sequence_count": "i32",
    }  # fmt: skip
    switches = ("DUAL_CLIP", "REFERENCE", "ENTROPY", "D_ENTROPY", "SEQUENCE_MEAN", "COUNT_SEQUENCES", "SEQUENCE_RATIO")
    constants = dict.fromkeys(switches, everything) | {
        "CAPPED": True, "IMPORTANCE": policy_loss.IMPORTANCE[importance],
        "SUM_COLUMNS": policy_loss.SUM_COLUMNS, "SCRATCH_COLUMNS": policy_loss.SCRATCH_COLUMNS,
        "REDUCE_ROWS": policy_loss.REDUCE_ROWS, "BLOCK": policy_loss.BLOCK,
    }  # fmt: skip
    if not everything:
        constants |= dict.fromkeys(("reference_logprobs", "entropy", "d_entropy"))
    assert_no_spills(compile_for_h100(kernel, types, constants, policy_loss.NUM_WARPS, tmp_path))


@pytest.mark.parametrize("control", ["gate", "linear", "none"])
@pytest.mark.parametrize("normalization", ["gdpo", "grpo"])
def test_advantages(normalization, control, tmp_path):
    """One program for any number of components."""
    from balcap_mega.kernels import advantages

    kernel = advantages.advantages_kernel
    types = {
        **dict.fromkeys(kernel.arg_names, "*fp32"), **dict.fromkeys(("valid", "acts_on", "gated", "scored"), "*i8"),
        **dict.fromkeys(("lower", "upper", "penalty", "epsilon"), "fp32"),
        "group_ids": "*i64", "counter": "*i32", "K": "i32", "N": "i32",
    }  # fmt: skip
    constants = {
        "CONTROL": control, "SUM_FIRST": normalization == "grpo",
        "WHITEN": normalization == "gdpo", "BLOCK_I": advantages.BLOCK_I, "BLOCK_J": advantages.BLOCK_J,
    }  # fmt: skip
    assert_no_spills(compile_for_h100(kernel, types, constants, advantages.NUM_WARPS, tmp_path))
