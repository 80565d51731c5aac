"""A store in one file: many processes of one machine, no server."""
