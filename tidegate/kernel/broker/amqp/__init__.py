"""AMQP 0-9-1 for the data path: frames that are frequent are packed and parsed here, the rest by pamqp."""
