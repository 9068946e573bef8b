"""Labelled images, from their source to batches."""
