"""Encoders: from observations to a distribution over the latent."""
