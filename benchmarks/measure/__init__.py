"""What benchmarks share: timing and checking (``harness``, ``checks``), bandwidth (``ceiling``), shapes (``sweep``,
``inputs``), other libraries (``peers``, ``model_sides``), keys of a real model and ways to store their index."""
