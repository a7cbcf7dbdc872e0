"""The machines of a study: capacity, resource requests, a Ray cluster of its own or an existing one."""
