"""The multi-head KL divergence: specification, torch and Triton implementations, operators."""
