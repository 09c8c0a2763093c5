"""Studies that train many models."""
