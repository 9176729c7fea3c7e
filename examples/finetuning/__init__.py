"""Data and measurements of ``examples/finetune.py``: does a model that reads few pages still read and still find?

Training sequences are prose with facts spread in it ("The code of the Lisbon archive is 48213.") and questions about
some of them at the end. What is measured, on prose and on facts that training never saw: the perplexity of prose, and
how many questions are answered with exactly the right digits.
"""

from examples.finetuning.data import (
    CITIES,
    HELD_OUT_CITIES,
    PLACES,
    Sample,
    fact_count,
    offline_documents,
    prose_window,
    read_documents,
    sample,
    tokenize,
    training_data,
)
from examples.finetuning.measure import Evaluation, decoding, token_nll
from examples.finetuning.report import METRICS, plot, summarize, table, variant

__all__ = [
    "CITIES",
    "HELD_OUT_CITIES",
    "METRICS",
    "PLACES",
    "Evaluation",
    "Sample",
    "decoding",
    "fact_count",
    "offline_documents",
    "plot",
    "prose_window",
    "read_documents",
    "sample",
    "summarize",
    "table",
    "token_nll",
    "tokenize",
    "training_data",
    "variant",
]
