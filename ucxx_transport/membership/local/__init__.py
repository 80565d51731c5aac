"""A store in one SQLite file: many processes of one machine, no server."""
