"""Jobs while every part is killed. The client's list of 202s is compared with all results."""
