"""What a run tells its reader: metrics, figures and a page."""
