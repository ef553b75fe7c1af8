#!/usr/bin/env python3
"""Hold a checkpoint on Megatron, at any layout, against transformers' own model:

    torchrun --nproc-per-node N launch/check_model.py --model DIR --tensor T --pipeline P

Prints the largest differences of logits and logprobs over a mixed batch (two image sizes and text alone, packed into
one row), and exits with status 1 where a logprob differs by more than the tolerance.
"""

import argparse
import os
import sys

from pydantic import ValidationError

from balcap_mega.cli import exit_on_user_error
from balcap_mega.config.schema import ModelConfig, ParallelConfig

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.2}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="a Hugging Face folder")
    parser.add_argument("--tensor", "--tp", type=int, default=1, help="tensor-parallel size")
    parser.add_argument("--pipeline", "--pp", type=int, default=1, help="pipeline-parallel size")
    parser.add_argument("--sequence", action="store_true", help="sequence parallelism")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    parser.add_argument("--tolerance", type=float, help="largest allowed logprob difference (by dtype)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    arguments = parser.parse_args()
    try:
        arguments.parallel = ParallelConfig(
            tensor=arguments.tensor,
            pipeline=arguments.pipeline,
            sequence=arguments.sequence,
            device=arguments.device,
        )
    except ValidationError as error:
        parser.error(str(error))
    return arguments


def main() -> None:
    arguments = parse_arguments()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    tolerance = TOLERANCE[arguments.dtype] if arguments.tolerance is None else arguments.tolerance
    with exit_on_user_error():
        model = ModelConfig(path=arguments.model, dtype=arguments.dtype)
        from torch.distributed import destroy_process_group

        from balcap_mega.diagnostics.model_parity import compare_with_transformers

        parity = compare_with_transformers(model, arguments.parallel)
        destroy_process_group()  # its threads, left to the interpreter's exit, may abort a rank that is done
    if os.environ.get("RANK", "0") == "0":
        print(parity.report(tolerance), flush=True)
    sys.exit(0 if parity.within(tolerance) else 1)


if __name__ == "__main__":
    main()
