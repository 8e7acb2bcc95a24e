"""The modules of TorchServe's package ``ts`` that handlers import. The server is left out."""
