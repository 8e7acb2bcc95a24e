"""Measurements of Tidegate and of the products that a user could choose instead. See README.md here."""
