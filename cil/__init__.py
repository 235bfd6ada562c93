"""cil: class-incremental learning with generative classifiers."""

__version__ = "0.1.0"
