"""AMQP 0-9-1 for the data path. It packs and parses frequent frames itself. pamqp handles other frames."""
