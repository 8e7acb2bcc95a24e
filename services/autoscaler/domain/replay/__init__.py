"""What another policy would have done: arrivals through a simulated queue and the very ``decide``."""
