"""Documents to tokens to chunks."""
