"""The AMQP 0-9-1 driver for requests, replies and jobs.

This package packs and parses the frequent frames itself. pamqp handles all others.
"""
