"""The method as pure PyTorch functions on tensors: no I/O, no configuration objects, no collectives.

Shapes are named by the letters of the paper:
    S sequences in a batch      T tokens per sequence     B anchors per sequence (padded; see `Anchors.valid`)
    n samples per context       G tokens per completion   d feature size       V vocabulary       H hidden size
Equation numbers are those of "Matching Features, Not Tokens: Energy-Based Fine-Tuning of Language Models".
"""
