"""The training loop, runnable without Ray, and the worker that Ray Train runs it in."""
