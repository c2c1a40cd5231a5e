"""The mesh: which devices there are, which part of each array they hold, and what they send each other."""
