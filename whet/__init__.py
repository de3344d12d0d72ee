"""Whet sharpens a pretrained base language model into an assistant."""
