"""From a manifest to batches of crops and masks."""

from training.data.batches import Batch, batches, micro_batch_size
from training.data.config import DataConfig

__all__ = ["Batch", "DataConfig", "batches", "micro_batch_size"]
