"""How fast compressed models generate, and what they hold: make bench-inference."""
