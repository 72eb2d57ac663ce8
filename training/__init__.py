"""LLaVA training: `train.py`, read from top to bottom, is the whole of it; its neighbours hold the parts.

In a checkout this folder lies beside the package, in a wheel inside it; either way it is imported as
`llava_convert.training` (see `llava_convert.core.resources.training`).
"""
