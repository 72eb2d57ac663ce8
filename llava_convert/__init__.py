"""Convert LLaVA checkpoints between every layout in use, exactly."""

__version__ = "0.1.0"
