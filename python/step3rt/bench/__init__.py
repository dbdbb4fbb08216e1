"""Measurements, one command per module. Imports nothing itself."""
