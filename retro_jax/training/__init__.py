"""Batches -> a trained model: loss, optimizer, step, loop, checkpoints, metrics."""
