"""Trained models -> figures on held-out documents."""
