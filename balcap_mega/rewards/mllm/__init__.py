"""A multimodal LLM as judge: `judge.MllmJudge`, its questions and prompts, and the client that asks them.

To serve a judge on spare GPUs, as `launch/judge_slurm.sh` does:

    vllm serve Qwen/Qwen2.5-VL-72B-Instruct --tensor-parallel-size 4 --enable-prefix-caching --max-model-len 16384 \\
        --enable-prompt-tokens-details \\
        --structured-outputs-config '{"backend": "xgrammar", "disable_any_whitespace": true}'

The last option keeps a judge from filling a reply with blanks, which JSON allows, up to its token limit; the one before
it tells how much of each prompt was in the prefix cache.
"""
