"""Labelled images: a file for each kind of source, which loads a `Source`, and the pipeline from there to batches."""
