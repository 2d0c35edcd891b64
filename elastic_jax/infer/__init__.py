"""Generation from any size; one size thinks, another answers."""
