"""Who computes numbered blocks (this process, processes of this machine, actors of a Ray cluster), and when one is given up."""
