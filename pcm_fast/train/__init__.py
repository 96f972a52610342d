"""Training: rewards, expert adapters by preference optimisation, the Preference Control Model by REBEL."""
