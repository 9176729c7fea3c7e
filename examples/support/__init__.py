"""What the examples and the benchmarks share: a model, a document, a decoder that measures, results of a run."""

from pathlib import Path

DOCUMENT = Path(__file__).with_name("carrow_head.txt")  # a history of a lighthouse, written for the demo
