"""AMQP 0-9-1 for the data path. This package packs and parses frequent frames; pamqp handles others."""
