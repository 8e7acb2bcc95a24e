"""The part of TorchServe that handlers use, without its server."""
