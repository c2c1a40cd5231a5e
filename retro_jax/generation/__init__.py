"""Completions of prompts: prefill, decoding with a key/value cache, sampling, retrieval in the loop."""
