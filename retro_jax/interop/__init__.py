"""Checkpoints of other implementations, read and written: tables of names and layouts, one format a module."""
