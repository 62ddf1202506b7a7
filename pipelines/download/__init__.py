"""Fetching images from strangers' servers: addresses, robots rules, bounds, and shards written whole."""
