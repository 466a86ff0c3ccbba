"""Commands that measure speed, memory and exactness."""
