"""The process of vLLM: a Ray actor that samples for one trial, or for all trials of a study in turn.

vLLM has its own process because it initialises torch.distributed, seeds the global generators, and changes the
thread settings of its process.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ebft_study.errors import ConfigError, ServiceError, one_line

if TYPE_CHECKING:
    from ebft_study.rollouts.vllm.weights import Layout

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # an engine core in a process of its own would outlive this one
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",  # opt-in only
    "VLLM_DO_NOT_TRACK": "1",
}
CPU_ENVIRONMENT = {
    "TORCH_COMPILE_DISABLE": "1",  # compiling takes longer than many a trial
    "OMP_NUM_THREADS": "1",  # spinning threads starve the trainer
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # all engines of a machine would bind to the same cores
}
_READER = "ebft_study.rollouts.vllm.reader.WeightReader"
_BATCHED_TOKENS = 8192


@dataclass(frozen=True)
class EngineOptions:
    """Settings of an engine, as plain values."""

    model: str
    """Folder or hub id with the model's configuration; its weights come from the trainer."""
    revision: str | None
    dtype: str
    device: str
    longest_tokens: int
    """Tokens of prompt and completion."""
    tensor_parallel_size: int
    gpu_memory_utilization: float
    kv_cache_bytes: int
    colocated_with: str | None = None
    """CUDA_VISIBLE_DEVICES of the trainer whose GPU this engine shares."""


@dataclass(frozen=True)
class SampleRequest:
    """Request for n completions of at most G tokens for each prompt, from one version of a policy."""

    policy: str
    version: int
    prompts: list[list[int]]
    seeds: list[int]
    """One per prompt; sample j of it uses `seed + j`."""
    n_samples: int
    completion_length: int
    temperature: float
    end_tokens: tuple[int, ...] = ()
    """Tokens that end a completion; without any, all have exactly G tokens."""
    top_p: float = 1.0


@dataclass(frozen=True)
class SampleReply:
    """[prompts, n, L] tokens and log-probabilities of the tempered policy, L the longest completion's length."""

    tokens: np.ndarray
    """0 after the end."""
    log_probs: np.ndarray
    """0 after the end."""
    lengths: np.ndarray
    """[prompts, n]"""
    version: int
    load_seconds: float
    """Time spent on loading weights before sampling; 0 where the engine had them."""


class Engine:
    """The actor's class; its calls run one after another."""

    def __init__(self) -> None:
        self._llm: Any = None
        self._colocated = False
        self._loaded: tuple[str, int] | None = None

    def start(self, options: EngineOptions) -> float:
        """Load the model, without its weights; returns the seconds that it took.

        Raises:
            ConfigError: vLLM is not installed, or the model does not fit.
        """
        if self._llm is not None:
            return 0.0
        before = time.perf_counter()
        if options.colocated_with is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = options.colocated_with
        self._colocated = options.colocated_with is not None
        self._llm = _build(options)
        self._check_kernels(options)
        self._sleep()
        return time.perf_counter() - before

    def stop(self) -> None:
        """Stop vLLM's own processes and free its shared memory; the engine cannot sample afterwards."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None

    def process_id(self) -> int:
        return os.getpid()

    def map_weights(self, policy: str, path: str, layout: Layout) -> None:
        """Map the segment that a policy's trainer writes; a policy of that name may have had another one."""
        self._loaded = None
        self._llm.collective_rpc("map_weights", args=(policy, path, layout))

    def evict_weights(self, policy: str) -> None:
        """Unmap the segment of a policy that is no longer sampled from."""
        if self._llm is not None:
            self._llm.collective_rpc("evict_weights", args=(policy,))

    def sample(self, request: SampleRequest) -> SampleReply:
        """Sample from the requested version; loads its weights first if the engine has others."""
        if self._llm is None:
            raise ServiceError("the rollout engine was replaced by a new one, which has no weights yet")
        load_seconds = self._load(request.policy, request.version)
        outputs = self._generate(request)
        self._sleep()
        tokens, lengths = _padded([[list(c.token_ids) for c in o.outputs] for o in outputs], np.int64)
        log_probs, scored = _padded([[list(c.logprobs.logprobs) for c in o.outputs] for o in outputs], np.float32)
        expected = (len(request.prompts), request.n_samples)
        complete = request.end_tokens or bool((lengths == request.completion_length).all())
        if lengths.shape != expected or not np.array_equal(lengths, scored) or not complete:
            raise ServiceError(
                f"vLLM returned completions of {lengths.tolist()} tokens with {scored.tolist()} log-probs for "
                f"{expected[0]} prompts, {expected[1]} samples and {request.completion_length} tokens"
            )
        return SampleReply(tokens, log_probs, lengths, request.version, load_seconds)

    def _check_kernels(self, options: EngineOptions) -> None:
        """Sample one token from dummy weights: some models load, but have no kernels."""
        try:
            self._generate(SampleRequest("", 0, [[0]], [0], n_samples=1, completion_length=1, temperature=1.0))
        except (ValueError, RuntimeError) as error:
            self._llm = None
            raise ConfigError(_explain(options, error)) from error

    def _sleep(self) -> None:
        """Free the memory for a trainer on the same GPU; weights come back from its segment."""
        if self._colocated:
            self._llm.sleep(level=2)
            self._loaded = None

    def _load(self, policy: str, version: int) -> float:
        if self._loaded == (policy, version):
            return 0.0
        before = time.perf_counter()
        self._loaded = None
        if self._colocated:
            self._llm.wake_up(tags=["weights"])
        self._llm.collective_rpc("read_weights", args=(policy,))
        if self._colocated:
            self._llm.wake_up(tags=["kv_cache"])
        # Keys and values of other weights must not be reused.
        if not self._llm.reset_prefix_cache():
            raise ServiceError("vLLM did not empty its prefix cache, so samples would mix old and new weights")
        self._loaded = (policy, version)
        return time.perf_counter() - before

    def _generate(self, request: SampleRequest) -> list[Any]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = [
            SamplingParams(
                n=request.n_samples,
                max_tokens=request.completion_length,
                temperature=request.temperature,
                top_p=request.top_p,
                stop_token_ids=list(request.end_tokens),
                seed=seed,
                logprobs=0,
                flat_logprobs=True,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            for seed in request.seeds
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt in request.prompts]
        generated: list[Any] = self._llm.generate(prompts, parameters, use_tqdm=False)
        return generated


def _padded(rows: list[list[list[Any]]], dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """Completions [prompts][n] of their own lengths as one array, padded with 0, and the lengths."""
    lengths = np.array([[len(completion) for completion in row] for row in rows], dtype=np.int64)
    padded = np.zeros((*lengths.shape, int(lengths.max())), dtype=dtype)
    for (i, j), length in np.ndenumerate(lengths):
        padded[i, j, :length] = rows[i][j]
    return padded, lengths


def _build(options: EngineOptions) -> Any:
    try:
        from vllm import LLM
    except ImportError as error:
        raise ConfigError(
            f"rollout.backend='vllm': vLLM cannot be imported ({error}). Install it (GPU: pip install "
            "'ebft-study[vllm]'; CPU: make setup), or use backend=strided"
        ) from None
    on_cpu = options.device == "cpu"
    memory: dict[str, Any] = {"kv_cache_memory_bytes": options.kv_cache_bytes, "block_size": 32} if on_cpu else {}
    try:
        return LLM(
            options.model,
            revision=options.revision,
            # Weights come from the trainer before the first sample; token ids are all that goes in and out.
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype=options.dtype,
            max_model_len=options.longest_tokens,
            tensor_parallel_size=options.tensor_parallel_size,
            gpu_memory_utilization=options.gpu_memory_utilization,
            enforce_eager=on_cpu,
            enable_sleep_mode=options.colocated_with is not None,
            enable_prefix_caching=True,
            # A seeded request whose prompt is run in parts ends the engine on a CPU.
            enable_chunked_prefill=False,
            max_num_batched_tokens=max(_BATCHED_TOKENS, options.longest_tokens),
            # Without this the log-probabilities are those of temperature 1.
            logprobs_mode="processed_logprobs",
            disable_log_stats=True,
            worker_extension_cls=_READER,
            **memory,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(_explain(options, error)) from error


def _explain(options: EngineOptions, error: Exception) -> str:
    # Later sentences are advice about vLLM's own options.
    reason = one_line(error).split(". ")[0]
    if "memory" not in reason.lower():
        remedy = "Use a model that vLLM runs here, or backend=strided"
    elif options.device == "cpu":
        remedy = f"Raise vllm.kv_cache_gib={options.kv_cache_bytes / 2**30:.3g}, or use a shorter sequence_length"
    else:
        remedy = (
            f"Raise vllm.gpu_memory_utilization={options.gpu_memory_utilization:g}, or use more GPUs "
            f"(vllm.tensor_parallel_size={options.tensor_parallel_size})"
        )
    return f"rollout.backend='vllm': the engine does not start with {options.model!r} ({reason}). {remedy}"
