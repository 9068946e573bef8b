"""TF Serving: how the server is set up, and a client for it."""
