"""A page that classifies images in the browser with a run's .tflite files."""
