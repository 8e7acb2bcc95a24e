"""Values that services exchange with each other and with clients, and their codecs. Pure."""
