"""What the load generator reports, held against a server that knows what it really did."""
