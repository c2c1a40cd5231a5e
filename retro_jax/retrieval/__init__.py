"""From chunks to neighbours: embedders, indexes, search, neighbour tables, overlap."""
