"""Plans: addresses, chunk tables and overlap checks, made once per pair of networks and cached."""
