"""Groups of ranks: who belongs to one, who is about to, and how all come to agree on it."""
