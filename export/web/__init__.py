"""A page that runs a run's .tflite files in the browser."""
