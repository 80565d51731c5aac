"""Settings: where they come from, what they may hold, and how they become a frozen section."""
