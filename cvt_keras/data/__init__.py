"""Labelled images: one module per kind of source, which loads a `Source`, and the pipeline that makes batches of it."""
