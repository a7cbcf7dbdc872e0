"""The time that a study is expected to take, from the throughput of earlier trials; its plan."""
