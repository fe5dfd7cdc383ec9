"""Examples for training and inference: readers, shards, splits."""
