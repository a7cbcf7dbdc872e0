"""A Ray cluster of two machines, both of them this one, which ends when its input ends; run as a process of its own.

A line on its input kills the second machine with everything on it.
"""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster

if __name__ == "__main__":
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "include_dashboard": True,
            "dashboard_port": 0,
            "object_store_memory": 80_000_000,
        },
    )
    second = cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
    print(cluster.address, flush=True)
    if sys.stdin.readline():
        cluster.remove_node(second, allow_graceful=False)
        sys.stdin.read()
    cluster.shutdown()
