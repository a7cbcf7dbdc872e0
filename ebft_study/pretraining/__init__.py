"""The tiny models for laptops, pretrained on this machine, and the trigram model that they must beat."""
