"""The federation: GeoLoRA under differential privacy, node, aggregator, transport, command line."""
