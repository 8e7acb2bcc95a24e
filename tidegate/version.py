"""The version of Tidegate: of the SDK, the command line and the services."""

VERSION = "0.1.0"
