"""The protocol as bytes: frames, limits and the codec between them. No I/O."""
