"""Channels without effect, taken out."""
