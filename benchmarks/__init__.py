"""Measurements of Tidegate beside what a user would pick instead. See README.md here."""
