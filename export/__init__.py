"""What leaves the project: SavedModel and TFLite files, each checked by the runtime that its users run."""
