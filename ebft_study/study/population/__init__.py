"""Population-based training: exploit and explore."""
