"""Jobs while every part is killed: the client's own list of 202s against records, results and webhooks."""
