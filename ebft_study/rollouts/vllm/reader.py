"""Reads a policy's weights from shared memory, inside vLLM's worker processes.

vLLM mixes `WeightReader` into its worker class (`worker_extension_cls`) and imports this module before it loads a
model.
"""

from __future__ import annotations

from typing import Any

import torch
import vllm._custom_ops as operators
import vllm.model_executor.layers.utils as layers

from ebft_study.rollouts.vllm.weights import Layout, Segment

# On a CPU, vLLM's products (oneDNN's and, in bfloat16, its own) keep packed copies of the weights, which loading new
# ones does not reach; a tied head would silently use the old ones. Plain products read the weights themselves.
operators._supports_onednn = False
layers.check_cpu_sgl_kernel = lambda *_: False


class WeightReader:
    """Methods of a vLLM worker that the engine calls on all of them."""

    model_runner: Any

    def map_weights(self, policy: str, path: str, layout: Layout) -> None:
        """Map a policy's segment, whose name may be removed afterwards."""
        self._segments()[policy] = Segment(path, layout)

    def evict_weights(self, policy: str) -> None:
        """Unmap a policy's segment, and those of policies below it (`policy/answers`)."""
        for name in [name for name in self._segments() if f"{name}/".startswith(f"{policy}/")]:
            del self._segments()[name]

    @torch.no_grad()
    def read_weights(self, policy: str) -> None:
        """Load the policy's present weights into the model; into a sharded model, this worker's part of them."""
        model = self.model_runner.model
        model.load_weights(self._segments()[policy].read(next(model.parameters()).device))

    def _segments(self) -> dict[str, Segment]:
        segments: dict[str, Segment] = self.__dict__.setdefault("policy_segments", {})
        return segments
