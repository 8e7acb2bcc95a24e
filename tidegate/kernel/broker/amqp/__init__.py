"""The AMQP 0-9-1 driver for requests, replies and jobs.

This package packs and parses the most frequent AMQP frames itself. The library pamqp handles all others.
"""
