"""Make a model smaller and faster: try recipes on the user's samples, and choose by loss and latency."""
