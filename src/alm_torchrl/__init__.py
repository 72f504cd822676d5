"""Aligned Latent Models for TorchRL."""
