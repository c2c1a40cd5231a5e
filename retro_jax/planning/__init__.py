"""What a config costs: operations, bytes sent and bytes held, read off the program that would run."""
