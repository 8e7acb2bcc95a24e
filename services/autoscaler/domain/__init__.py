"""The autoscaler's decisions and their data. This code does no I/O and reads no clock."""
