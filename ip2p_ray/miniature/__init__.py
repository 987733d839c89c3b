"""The miniature: a drawn world, its exact oracle, and four small models trained on it."""
