"""Measurements of the package, from a checkout: ``python -m benchmarks NAME``.

``suite/`` has a module for each benchmark, ``measure/`` what they share, ``report/`` what is made of results: tables
and pictures for the README and the pages in ``docs/``. ``results/`` holds committed results.
"""
