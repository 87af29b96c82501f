"""Point-in-time images of the host tier on disk."""
