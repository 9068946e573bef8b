"""TF Serving: the configuration of a server, and a client."""
