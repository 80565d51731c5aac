"""An in-memory link, so that programs can be tested without UCX."""
