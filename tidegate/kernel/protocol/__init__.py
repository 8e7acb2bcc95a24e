"""What crosses a boundary between two services or to a client, as pure values and codecs."""
