"""The report of a run: metrics, figures and an HTML page."""
