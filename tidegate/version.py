"""The version of Tidegate. SDK, command line and services have the same version."""

VERSION = "0.1.0"
