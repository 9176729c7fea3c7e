"""What one does with the package, from a checkout: ``python -m examples.demo``, ``python examples/generate.py``."""
