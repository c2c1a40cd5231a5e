"""Chunks and their neighbours -> batches: training rows, held-out windows, and the pipeline that reads them."""
