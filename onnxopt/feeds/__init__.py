"""Feeds: real model inputs, read when used, in parts that calibrate, choose and judge."""

from onnxopt.feeds.batches import Batch, batch_trouble, batched
from onnxopt.feeds.images import Images
from onnxopt.feeds.open import Data, open_feeds
from onnxopt.feeds.sample import Feeds, Sample
from onnxopt.feeds.split import Split, split_feeds
from onnxopt.feeds.synthetic import redrawn_feeds, runnable_feeds, synthetic_feeds

__all__ = [
    "Batch",
    "Data",
    "Feeds",
    "Images",
    "Sample",
    "Split",
    "batch_trouble",
    "batched",
    "open_feeds",
    "redrawn_feeds",
    "runnable_feeds",
    "split_feeds",
    "synthetic_feeds",
]
