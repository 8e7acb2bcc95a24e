"""AMQP 0-9-1 for the data path. Frequent frames are packed and parsed here, all others by pamqp."""
