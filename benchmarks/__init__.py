"""Benchmarks of one EBFT step: against the published way of computing it, and against the machine's ceiling.

    ebft-study bench                       sections of one step (`sections.py`)
    ebft-study bench rollouts              strided rollouts against a vLLM engine (`engines.py`); needs ray and vllm
    ebft-study bench features              a grid's feature networks against one service (`services.py`); needs ray

`python -m benchmarks` is the same command. Contenders run alternately in one process, so that a noisy machine disturbs
all alike; every number is a median with its spread. Whether they compute the same is checked first (`agreement.py`).
The published way is `naive.py`, which is also the reference of the package's tests. This package is part of the source
checkout only; nothing in `ebft_study` needs it.
"""
