"""Generation with compressed models: packed products and caches of latents."""
