"""Language models: loading them, adapters, and forward passes over a shared prefix and many blocks."""
